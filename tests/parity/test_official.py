"""Number for number: every value of the official implementation's golden cases against ours.

``pytest tests/parity --goldens=DIR`` runs the cases under another folder.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.parity.cases import Case, folders
from tests.parity.groups import GROUPS, Values

pytestmark = pytest.mark.slow

# First match decides: 'exact', ('abs', x): largest difference, ('rel', x): norm of the difference
# over the norm of the official value.
TOLERANCES = (
    (r"ids$|lengths$|queue_ptr$|idx_queue$|/neg_", "exact"),
    (r"(^|/)grad/|^norm/", ("rel", 1e-3)),
    (r"loss", ("rel", 1e-5)),
    (r"^(sum|metric)/", ("rel", 1e-5)),
    (r"", ("abs", 1e-4)),
)
# Outputs that nothing is compared with, and why.
UNREAD = {
    r"^alpha[\d.]+/sim_[it]2[it]_m$": (
        "a hook caught attention logits [B, heads, L, L] in place of the momentum similarities; "
        "those show in loss_ita, whose targets they are"
    ),
    r"^sum/": (
        "momentum twins of what the model never reads (CLIP's text tower, dead fusion layers, tied "
        "copies); those of every parameter that it has are compared"
    ),
    r"^metric/.*(r5|r10|mean)$": (
        "recall beyond the k_test re-ranked candidates depends on how a sort orders ties at -100"
    ),
}


@functools.lru_cache
def case_of(folder: Path) -> Case:
    return Case(folder)


@functools.lru_cache
def values_of(folder: Path, group: str) -> Values:
    case = case_of(folder)
    return {g.__name__: g for g in GROUPS[case.kind]}[group](case)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    found = folders(metafunc.config.getoption("--goldens"))
    if "group" in metafunc.fixturenames:
        pairs = [(f, g.__name__) for f in found for g in GROUPS[case_of(f).kind]]
        names = [f"{folder.name}-{group}" for folder, group in pairs]
        metafunc.parametrize(("folder", "group"), pairs, ids=names)
    elif "folder" in metafunc.fixturenames:
        metafunc.parametrize("folder", found, ids=[folder.name for folder in found])


def official(case: Case) -> dict[str, np.ndarray]:
    """Outputs by name, and what the settings hold of them."""
    s = case.settings
    found = dict(case.outputs)
    if isinstance(s.get("loss"), float):
        found.setdefault("loss", np.float32(s["loss"]))
    found |= {f"norm/{name}": np.float64(x) for name, x in (s.get("grad_norms") or {}).items()}
    found |= {f"metric/{name}": np.float64(x) for name, x in (s.get("eval_result") or {}).items()}
    found |= {f"sum/{n}": np.float64(x) for n, x in (s.get("momentum_sums_after") or {}).items()}
    for name in [name for name in found if re.search(r"/weights_", name)]:
        # The official weights of the draw lack a normalisation, which the draw makes up for.
        found[name] = found[name] / found[name].sum(axis=1, keepdims=True)
    return found


def differences(expected: dict[str, np.ndarray], values: Values) -> Iterator[str]:
    for name in sorted(expected.keys() & values.keys()):
        tolerance = next(t for pattern, t in TOLERANCES if re.search(pattern, name))
        ours, theirs = np.asarray(values[name].array), np.asarray(expected[name])
        if ours.shape != theirs.shape:
            yield f"{name}: shape {ours.shape}, officially {theirs.shape}"
            continue
        where = values[name].where
        error = (
            distance(ours, theirs, tolerance)
            if where is None
            else distance(ours[where], theirs[where], tolerance)
        )
        if not error <= 1:
            yield f"{name}: {error:.3g} times the tolerance {tolerance}"


def distance(ours: np.ndarray, theirs: np.ndarray, tolerance: Any) -> float:
    """How far apart, in units of the tolerance."""
    if tolerance == "exact":
        return 0.0 if np.array_equal(ours, theirs) else np.inf
    kind, limit = tolerance
    difference = ours.astype(np.float64) - theirs.astype(np.float64)
    if kind == "abs":
        return float(np.abs(difference).max(initial=0.0) / limit)
    # The floor: gradients that are zero but for rounding (a key's bias) have no relative error.
    return float(np.linalg.norm(difference) / (limit * max(np.linalg.norm(theirs), 1e-3)))


def test_values_equal_the_official_ones(folder, group):
    expected, values = official(case_of(folder)), values_of(folder, group)
    if values:
        assert expected.keys() & values.keys(), "the group has nothing to compare"
    assert not list(differences(expected, values))


def test_no_output_is_left_out(folder):
    case = case_of(folder)
    read = set().union(*(values_of(folder, group.__name__) for group in GROUPS[case.kind]))
    left = [n for n in official(case) if n not in read]
    assert not [n for n in left if not any(re.search(pattern, n) for pattern in UNREAD)]


def test_a_wrong_value_is_seen(folder):
    """The comparison itself: every value it reads, made wrong, is reported."""
    case = case_of(folder)
    expected = official(case)
    for group in GROUPS[case.kind]:
        values = values_of(folder, group.__name__)
        wrong = {
            name: value._replace(array=np.asarray(value.array) * 1.01 + 1)
            for name, value in values.items()
        }
        reported = {line.split(": ")[0] for line in differences(expected, wrong)}
        assert reported == expected.keys() & values.keys()
