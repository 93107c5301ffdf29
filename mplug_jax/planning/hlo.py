"""The collectives of a compiled program, read from its text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from mplug_jax.planning.collectives import Collective

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {
    "pred": 1,
    "bf16": 2,
    **{f"{kind}{bits}": bits // 8 for kind in "fsu" for bits in (8, 16, 32, 64)},
}
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\(")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')
_CALLED = re.compile(r"(?:body|to_apply|calls|branch_computations)=\{?((?:%?[\w.\-]+(?:, )?)+)\}?")


def collectives_of(text: str, devices: int) -> list[Collective]:
    """Every collective of a program's text and how often a step runs it.

    A loop counts as often as the compiler knows it turns, else once.
    """
    bodies, entry = _computations(text)
    times = _times(bodies, entry)
    found = []
    for name, lines in bodies.items():
        for line in lines:
            match = _COLLECTIVE.search(line)
            if match and times.get(name):
                found.append(_collective(match, line, times[name], devices))
    return found


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    bodies: dict[str, list[str]] = {}
    entry = current = ""
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            current = head[2]
            bodies[current] = []
            entry = current if head[1] else entry
        elif current:
            bodies[current].append(line)
    return bodies, entry


def _times(bodies: dict[str, list[str]], entry: str) -> dict[str, int]:
    """How often each computation runs."""
    times: dict[str, int] = {}

    def visit(name: str, factor: int) -> None:
        times[name] = times.get(name, 0) + factor
        for called, turns in _calls(bodies.get(name, [])):
            visit(called, factor * turns)

    visit(entry, 1)
    return times


def _calls(lines: list[str]) -> Iterator[tuple[str, int]]:
    for line in lines:
        if " fusion(" in line:  # holds no collective
            continue
        turns = _TRIPS.search(line)
        for match in _CALLED.finditer(line):
            for name in match[1].split(", "):
                yield name.lstrip("%"), int(turns[1]) if turns else 1


def _collective(match: re.Match[str], line: str, times: int, devices: int) -> Collective:
    kind = match[2]
    size = sum(
        _BYTES.get(dtype, 4) * math.prod(map(int, filter(None, shape.split(","))))
        for dtype, shape in _SHAPE.findall(match[1])
    )
    group = 2 if kind == "collective-permute" else _group(line, devices)
    size *= group if kind == "reduce-scatter" else 1
    source = re.search(r'op_name="([^"]*)"', line)
    return Collective(source[1] if source else "", kind, group, 1, size, times)


def _group(line: str, devices: int) -> int:
    """Devices of a group, in any of the ways that groups are written."""
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    if tiled := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(tiled[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(listed[1].split(","))
    return devices
