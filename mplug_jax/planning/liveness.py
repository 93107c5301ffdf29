"""How much memory a traced program needs, and moves, by walking its jaxpr.

A compiler fuses: an element-wise result that only element-wise work or a reduction reads is never
written down. What is written down (a *buffer*) lives from the equation that makes it to the last
one that reads it, or reads something that was fused from it. The walk follows the order of the
program; XLA's own order may save more.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jax.extend import core

# Cheap to repeat in every reader: views, conversions, and arithmetic on what is at hand.
_CHEAP = frozenset(
    [
        "abs",
        "add",
        "add_any",
        "and",
        "broadcast_in_dim",
        "clamp",
        "convert_element_type",
        "copy",
        "eq",
        "ge",
        "gt",
        "integer_pow",
        "iota",
        "is_finite",
        "le",
        "lt",
        "max",
        "min",
        "mul",
        "ne",
        "neg",
        "nextafter",
        "not",
        "or",
        "reshape",
        "rev",
        "select_n",
        "shift_left",
        "shift_right_arithmetic",
        "shift_right_logical",
        "sign",
        "slice",
        "split",
        "square",
        "squeeze",
        "stop_gradient",
        "sub",
        "transpose",
        "xor",
        "optimization_barrier",
        "random_wrap",
        "random_unwrap",
        "expand_dims",
    ]
)
# Element-wise too, but written down where several readers would each compute them again.
_DEAR = frozenset(
    [
        "div",
        "erf",
        "erf_inv",
        "exp",
        "exp2",
        "expm1",
        "log",
        "log1p",
        "logistic",
        "pow",
        "rem",
        "round",
        "rsqrt",
        "sqrt",
        "tanh",
    ]
)
_REDUCTIONS = frozenset(
    [
        "argmax",
        "argmin",
        "reduce_and",
        "reduce_max",
        "reduce_min",
        "reduce_or",
        "reduce_prod",
        "reduce_sum",
    ]
)
_CALLS = frozenset(
    [
        "checkpoint",
        "closed_call",
        "core_call",
        "custom_jvp_call",
        "custom_vjp_call",
        "jit",
        "pjit",
        "remat",
        "remat2",
        "custom_vjp_call_jaxpr",
    ]
)
_BODIES = ("jaxpr", "call_jaxpr", "fun_jaxpr")

# Bytes of one value on one device.
SizeOf = Callable[[Any], float]


@dataclasses.dataclass(frozen=True)
class Usage:
    """What a program needs on one device.

    Attributes:
      peak: bytes of buffers alive at once, arguments and results of the program left out.
      traffic: bytes that its buffers and arguments are read and written with.
    """

    peak: float
    traffic: float


def usage(jaxpr: core.Jaxpr, size_of: SizeOf, *, merged: bool = False) -> Usage:
    """Peak and traffic of a program whose inputs and outputs lie elsewhere.

    ``merged``: equal operations on equal values are one, across the barriers of rematerialisation,
    as on XLA's CPU backend: there only a loop recomputes anything.
    """
    operations, outputs = _flat(jaxpr, merged)
    return _Buffers(size_of).walk(operations, outputs)


class _Operation(NamedTuple):
    """An equation whose values have numbers of their own, wherever it was called."""

    name: str
    equation: core.JaxprEqn
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def _flat(jaxpr: core.Jaxpr, merged: bool) -> tuple[list[_Operation], list[int]]:
    """The operations that a result depends on, calls written out in place, and the results."""
    operations: list[_Operation] = []
    numbers = itertools.count()
    done: dict[Any, list[int]] = {}

    def run(inner: core.Jaxpr, given: Sequence[int]) -> list[int]:
        known = dict(zip(inner.invars, given, strict=True))
        known |= {variable: next(numbers) for variable in inner.constvars}

        def number(atom: Any) -> int:
            return -1 if isinstance(atom, core.Literal) else known[atom]

        for equation in inner.eqns:
            inputs = tuple(map(number, equation.invars))
            called = _called(equation)
            name = equation.primitive.name
            same = _identity(equation, inputs) if merged else None
            if called is not None:
                results = run(called, inputs)
            elif merged and name == "optimization_barrier":
                results = list(inputs)
            elif same is not None and same in done:
                results = done[same]
            else:
                results = [next(numbers) for _ in equation.outvars]
                operations.append(_Operation(name, equation, inputs, tuple(results)))
                if same is not None:
                    done[same] = results
            known |= dict(zip(equation.outvars, results, strict=True))
        return [number(variable) for variable in inner.outvars]

    results = run(jaxpr, [next(numbers) for _ in jaxpr.invars])
    needed, kept = set(results), []
    for operation in reversed(operations):
        if needed.intersection(operation.outputs):
            needed.update(operation.inputs)
            kept.append(operation)
    return kept[::-1], results


def _identity(equation: core.JaxprEqn, inputs: Sequence[int]) -> Any:
    """What two equations share that compute the same; None for loops and branches."""
    if equation.primitive.name in ("scan", "while", "cond", *_CALLS):
        return None
    literals = [str(v) for v in equation.invars if isinstance(v, core.Literal)]
    parameters = sorted((key, str(value)) for key, value in equation.params.items())
    return equation.primitive.name, tuple(inputs), tuple(literals), tuple(parameters)


class _Buffers:
    """What is written down, from when to when."""

    def __init__(self, size_of: SizeOf):
        self._size_of = size_of
        self._sources: dict[int, frozenset[int]] = {}  # value -> the buffers it is made of
        self._sizes: list[float] = []
        self._lives: list[list[int]] = []  # [first, last] event of each buffer
        self._inside: list[float] = []  # of each event, memory alive inside it alone
        self._traffic = 0.0

    def walk(self, operations: Sequence[_Operation], results: Sequence[int]) -> Usage:
        """Peak over the operations; buffers of results are not counted."""
        readers: dict[int, list[str]] = {}
        for operation in operations:
            for value in operation.inputs:
                readers.setdefault(value, []).append(operation.name)
        for value in results:
            readers.setdefault(value, []).append("return")
        for operation in operations:
            read = frozenset().union(*(self._sources.get(v, ()) for v in operation.inputs))
            if self._fuses(operation, readers):
                self._sources.update(dict.fromkeys(operation.outputs, read))
            else:
                self._write(operation, read)
        kept = frozenset().union(*(self._sources.get(v, ()) for v in results))
        return Usage(self._peak(kept), self._traffic)

    def _fuses(self, operation: _Operation, readers: Mapping[int, list[str]]) -> bool:
        if operation.name not in _CHEAP | _DEAR:
            return False
        users = [user for value in operation.outputs for user in readers.get(value, ())]
        if operation.name in _DEAR and len(users) > 1:
            return False
        return all(user in _CHEAP | _DEAR | _REDUCTIONS for user in users)

    def _write(self, operation: _Operation, read: frozenset[int]) -> None:
        equation, time = operation.equation, len(self._inside)
        inside = _inside(equation, self._size_of)
        self._inside.append(inside.peak)
        for buffer in read:
            self._lives[buffer][1] = time
        self._traffic += inside.traffic or sum_bytes(
            [v.aval for v in (*equation.invars, *equation.outvars)], self._size_of
        )
        for value, variable in zip(operation.outputs, equation.outvars, strict=True):
            self._sources[value] = frozenset((len(self._sizes),))
            self._sizes.append(self._size_of(variable.aval))
            self._lives.append([time, time])

    def _peak(self, kept: frozenset[int]) -> float:
        changes = [0.0] * (len(self._inside) + 1)
        for buffer, (first, last) in enumerate(self._lives):
            if buffer not in kept:
                changes[first] += self._sizes[buffer]
                changes[last + 1] -= self._sizes[buffer]
        alive = itertools.accumulate(changes)
        return max((a + b for a, b in zip(alive, self._inside, strict=False)), default=0.0)


def _inside(equation: core.JaxprEqn, size_of: SizeOf) -> Usage:
    """What a loop or a branch needs while it runs, besides its inputs and outputs."""
    name, params = equation.primitive.name, equation.params
    if name == "scan":
        body = params["jaxpr"].jaxpr
        within = usage(body, size_of)
        carries = sum_bytes([v.aval for v in body.outvars[: params["num_carry"]]], size_of)
        touched = sum_bytes([v.aval for v in (*body.invars, *body.outvars)], size_of)
        # The carry of the next turn is written while that of this one is still read.
        return Usage(within.peak + carries, params["length"] * (within.traffic + touched))
    if name == "cond":
        branches = [usage(branch.jaxpr, size_of) for branch in params["branches"]]
        return Usage(max(b.peak for b in branches), max(b.traffic for b in branches))
    if name == "while":
        return usage(params["body_jaxpr"].jaxpr, size_of)
    return Usage(0.0, 0.0)


def _called(equation: core.JaxprEqn) -> core.Jaxpr | None:
    if equation.primitive.name not in _CALLS:
        return None
    inner = next(equation.params[key] for key in _BODIES if key in equation.params)
    return inner.jaxpr if isinstance(inner, core.ClosedJaxpr) else inner


def bytes_of(aval: Any) -> int:
    """Bytes of a value held whole; a typed random key counts its two words."""
    if not hasattr(aval, "shape"):
        return 0
    itemsize = getattr(aval.dtype, "itemsize", 8)
    return math.prod(aval.shape) * itemsize


def sum_bytes(avals: Sequence[Any], size_of: SizeOf = bytes_of) -> float:
    """Bytes of several values."""
    return sum(size_of(aval) for aval in avals)
