"""How a process learns of the others: flags, variables, launchers."""

from __future__ import annotations

import pytest

from mplug_jax.config import ConfigError
from mplug_jax.training.processes import Membership, membership

NONE = {"coordinator": "", "num_processes": "", "process_id": ""}
GIVEN = {"coordinator": "node1:8476", "num_processes": "4", "process_id": "3"}


def test_one_process_needs_nothing():
    assert membership(NONE, {"HOME": "/root", "JOB_COMPLETION_INDEX": "2"}) is None
    assert membership(NONE, {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) is None
    # Inside `salloc`, before any `srun`.
    assert membership(NONE, {"SLURM_NTASKS": "8"}) is None


@pytest.mark.parametrize(
    ("given", "environment", "expected"),
    [
        (GIVEN, {}, Membership("node1:8476", 4, 3)),
        (GIVEN, {"JAX_PROCESS_ID": "1", "SLURM_PROCID": "2"}, Membership("node1:8476", 4, 3)),
        (
            NONE,
            {
                "JAX_COORDINATOR_ADDRESS": "[::1]:9",
                "JAX_NUM_PROCESSES": "2",
                "JOB_COMPLETION_INDEX": "1",
            },
            Membership("[::1]:9", 2, 1),
        ),
        (
            NONE,
            {
                "JAX_COORDINATOR_ADDRESS": "a:9",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": "0",
                "JOB_COMPLETION_INDEX": "1",
            },
            Membership("a:9", 2, 0),
        ),
        (NONE, {"SLURM_NTASKS": "16", "SLURM_PROCID": "5"}, Membership(detection="slurm")),
        (
            NONE,
            {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"},
            Membership(detection="ompi"),
        ),
    ],
)
def test_flags_go_before_variables_and_those_before_launchers(given, environment, expected):
    assert membership(given, environment) == expected


def test_other_clusters_are_looked_for_on_request_only():
    assert membership(NONE, {}, detect=True) == Membership(detection="")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"process_id": ""}, "but not process_id.*--process_id or JAX_PROCESS_ID"),
        ({"coordinator": "node1"}, "--coordinator='node1' is no address: write host:port"),
        ({"num_processes": "four"}, "--num_processes='four' must be a number"),
        ({"process_id": "4"}, "--process_id=4 .* --num_processes=4 they are 0 to 3"),
    ],
)
def test_half_an_address_is_told(change, message):
    with pytest.raises(ConfigError, match=message):
        membership({**GIVEN, **change}, {})


def test_a_variable_is_named_as_it_was_found():
    with pytest.raises(ConfigError, match="JAX_NUM_PROCESSES='x' must be a number"):
        membership(
            NONE,
            {
                "JAX_COORDINATOR_ADDRESS": "a:9",
                "JAX_NUM_PROCESSES": "x",
                "JAX_PROCESS_ID": "0",
            },
        )
