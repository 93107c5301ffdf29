"""The account of a conversion, as people read it."""

import pytest

from mplug_jax.conversion.report import ConversionError, Report, account_unused, closest


def report() -> Report:
    return Report(
        used={"a.weight": ["p/kernel", "q/kernel"], "pos": ["positions"]},
        resized={"pos": "from (3, 3) to (2, 2)"},
        unused={"dead.1": "never run", "dead.2": "never run"},
        initial={"head/bias": "not in the file"},
        notes=["a note"],
    )


def test_everything_is_listed():
    assert report().describe() == (
        "a note\n"
        "used (tensor: parameters): 2\n"
        "  a.weight: p/kernel, q/kernel\n"
        "  pos: positions (from (3, 3) to (2, 2))\n"
        "not used (tensor: why): 2\n"
        "  dead.1: never run\n"
        "  dead.2: never run\n"
        "left at init (parameter: why): 1\n"
        "  head/bias: not in the file\n"
    )


def test_the_summary_groups_by_reason():
    lines = report().summary().splitlines()
    assert "not used: 2 tensors" in lines
    assert "  dead.1 and 1 more: never run" in lines
    assert "  pos: from (3, 3) to (2, 2)" in lines


def test_patterns_accept_what_they_match_and_no_more():
    r = Report(unexpected={"x.1": "", "y": " (closest: z)"}, missing={"p/q": " = w", "r": " = v"})
    with pytest.raises(ConversionError) as error:
        r.expect(unused=[r"^x\."], missing=["^p/"])
    assert str(error.value).splitlines()[:3] == [
        "1 unexpected tensors, 1 parameters that no tensor fills:",
        "  in the file, not in the model: y (closest: z)",
        "  in the model, not in the file: r = v",
    ]
    assert r.unused == {"x.1": r"accepted by --expect_unused=^x\."}
    assert r.initial == {"p/q": "accepted by --expect_missing=^p/"}
    r.expect(unused=["y"], missing=["r"])
    assert not r.unexpected and not r.missing


def test_an_impossible_pattern_is_told():
    with pytest.raises(ConversionError, match=r"--expect_unused=\(: missing \)"):
        Report(unexpected={"x": ""}).expect(unused=["("])


def test_two_files_may_use_the_same_names():
    r = Report()
    r.merge(Report(used={"layer.0": ["a"]}), "vision")
    r.merge(Report(used={"layer.0": ["b"]}, unexpected={"z": ""}, initial={"c": "why"}), "text")
    assert r.used == {"vision:layer.0": ["a"], "text:layer.0": ["b"]}
    assert r.unexpected == {"text:z": ""} and r.initial == {"c": "why"}


def test_what_is_left_over_is_dead_or_unexpected():
    r = Report(used={"a.weight": ["p"]}, unused={"tied": "a copy"})
    account_unused(r, ["a.weight", "tied", "pool.bias", "b.weihgt"], ["b.weight"], [("pool", "no")])
    assert r.unused == {"tied": "a copy", "pool.bias": "no"}
    assert r.unexpected == {"b.weihgt": " (closest: b.weight)"}


def test_nothing_alike_is_no_hint():
    assert closest("abc", ["xyz"]) == ""
