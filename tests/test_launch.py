"""The launchers, by their own validators; launch/local.sh also runs, in tests/test_processes.py."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from mplug_jax.training.processes import membership

LAUNCH = Path(__file__).resolve().parents[1] / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
NONE = {"coordinator": "", "num_processes": "", "process_id": ""}


def group(required: list[str], **properties: Any) -> dict[str, Any]:
    """An object without any other property: a misspelt key is what a validator is for."""
    return {
        "type": "object",
        "required": required,
        "additionalProperties": False,
        "properties": properties,
    }


def each(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "minItems": 1, "items": items}


TEXT = {"type": "string", "minLength": 1}
COUNT = {"type": "integer", "minimum": 1}
NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"}
CONTAINER = group(
    ["name", "image", "command", "env", "resources"],
    name=NAME,
    image=TEXT,
    workingDir=TEXT,
    command=each(TEXT),
    args=each(TEXT),
    env=each(group(["name", "value"], name={"type": "string", "pattern": "^[A-Z_]+$"}, value=TEXT)),
    ports=each(group(["containerPort"], containerPort={"type": "integer", "maximum": 65535})),
    resources=group(["limits"], limits={"type": "object", "minProperties": 1}),
    volumeMounts=each(
        group(["name", "mountPath"], name=NAME, mountPath=TEXT, readOnly={"type": "boolean"})
    ),
)
VOLUME = group(
    ["name"],
    name=NAME,
    persistentVolumeClaim=group(["claimName"], claimName=NAME, readOnly={"type": "boolean"}),
    emptyDir=group([], medium={"enum": ["", "Memory"]}, sizeLimit=TEXT),
)
POD = group(
    ["restartPolicy", "containers"],
    restartPolicy={"enum": ["Never", "OnFailure"]},
    terminationGracePeriodSeconds=COUNT,
    containers=each(CONTAINER),
    volumes=each(VOLUME),
)
JOB = group(
    ["completionMode", "completions", "parallelism", "template"],
    completionMode={"enum": ["Indexed", "NonIndexed"]},
    completions=COUNT,
    parallelism=COUNT,
    backoffLimit={"type": "integer", "minimum": 0},
    template=group(["spec"], spec=POD),
)
JOB_SET = group(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=group(["name"], name=NAME),
    spec=group(
        ["replicatedJobs"],
        failurePolicy=group([], maxRestarts={"type": "integer", "minimum": 0}),
        network=group([], enableDNSHostnames={"type": "boolean"}, subdomain=NAME),
        replicatedJobs=each(
            group(
                ["name", "template"], name=NAME, replicas=COUNT, template=group(["spec"], spec=JOB)
            )
        ),
    ),
)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_reads_each_script(script):
    subprocess.run(["bash", "-n", script], check=True)


def test_shellcheck_has_nothing_to_say():
    assert len(SCRIPTS) == 3
    shellcheck = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([shellcheck, *SCRIPTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("flags", [[], ["two", "train"], ["0", "train"], ["2"]])
def test_local_tells_how_it_is_used(flags):
    done = subprocess.run([LAUNCH / "local.sh", *flags], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("usage: launch/local.sh N ")


def test_the_job_set_is_one_and_its_pods_find_each_other():
    job_set = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())
    jsonschema.validate(job_set, JOB_SET)
    (replicated,) = job_set["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    # As JobSet names pods: <set>-<job>-<replica>-<index>.<subdomain>.
    host = f"{job_set['metadata']['name']}-{replicated['name']}-0-0"
    address = f"{host}.{job_set['spec']['network']['subdomain']}"
    variables = {item["name"]: item["value"] for item in container["env"]}
    for index in range(job["completions"]):
        # What Kubernetes adds for the pods of an indexed job.
        environment = variables | {"JOB_COMPLETION_INDEX": str(index)}
        joining = membership(NONE, environment)
        assert joining.coordinator == f"{address}:{container['ports'][0]['containerPort']}"
        assert (joining.num_processes, joining.process_id) == (job["parallelism"], index)
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}


def test_a_misspelt_key_of_the_job_set_is_found():
    job_set = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())
    job_set["spec"]["replicatedJobs"][0]["template"]["spec"]["paralellism"] = 4
    with pytest.raises(jsonschema.ValidationError, match="paralellism"):
        jsonschema.validate(job_set, JOB_SET)


def test_slurm_gives_a_run_time_to_save():
    """The signal goes to the tasks (no `B:`), which end with 143 themselves."""
    text = (LAUNCH / "slurm.sh").read_text()
    (signal,) = re.findall(r"(?m)^#SBATCH --signal=(\S+)$", text)
    name, seconds = signal.split("@")
    assert name == "TERM" and int(seconds) >= 300
    assert "srun" in text and "#SBATCH --requeue" in text
