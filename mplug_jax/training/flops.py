"""Count the multiply-adds of a traced function, for the model FLOP/s of a run.

XLA's own `cost_analysis()` counts the body of a scan once whatever its length, which makes it
useless for stacked layers; the jaxpr still knows the length.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core


def matmul_flops(fn: Callable[..., Any], *abstract_args: Any) -> int:
    """FLOPs of all matrix products and convolutions in one call of `fn`, over all devices.

    Args:
      fn: a function of arrays, jitted or not; close over what is static.
      *abstract_args: trees of arrays or `jax.ShapeDtypeStruct`; nothing is computed.

    Returns:
      2 * m * n * k summed over every `dot_general` and `conv_general_dilated`, so a multiply and
      an add count two. Element-wise work, softmax and norms count nothing (below 2 % of a
      transformer), and so does a kernel that is opaque to tracing.

    A scan counts its body times its length, a `cond` its dearest branch, a `while` its condition
    and body once, as nobody knows how often it runs. What rematerialisation computes again is
    counted too: for *model* FLOPs, by which utilisation is defined, trace without it.
    """
    return _jaxpr_flops(jax.make_jaxpr(fn)(*abstract_args).jaxpr)


def _jaxpr_flops(jaxpr: core.Jaxpr) -> int:
    return sum(_equation_flops(equation) for equation in jaxpr.eqns)


def _equation_flops(equation: core.JaxprEqn) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _dot_flops(equation)
    if name == "conv_general_dilated":
        return _conv_flops(equation)
    inner = [_jaxpr_flops(jaxpr) for jaxpr in _inner_jaxprs(params)]
    if name == "cond":
        return max(inner)
    if name == "scan":
        return params["length"] * sum(inner)
    if name == "shard_map":
        return _shard_count(params) * sum(inner)
    return sum(inner)


def _inner_jaxprs(params: Mapping[str, Any]) -> Iterator[core.Jaxpr]:
    """Every jaxpr among the parameters, whatever the primitive calls them."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item


def _shard_count(params: Mapping[str, Any]) -> int:
    """How many shards a `shard_map` body, whose shapes are those of one shard, runs for."""
    return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])


def _dot_flops(equation: core.JaxprEqn) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    lhs_shape = equation.invars[0].aval.shape
    terms = math.prod(lhs_shape[axis] for axis in contracted)
    return 2 * math.prod(equation.outvars[0].aval.shape) * terms


def _conv_flops(equation: core.JaxprEqn) -> int:
    """Products with a real input element; those with padding or dilation's zeros are not work.

    Without this a strided convolution's input gradient, itself a convolution over a dilated
    input, would cost stride² times the forward pass.
    """
    params = equation.params
    lhs, rhs = (variable.aval.shape for variable in equation.invars)
    out = equation.outvars[0].aval.shape
    numbers = params["dimension_numbers"]
    pairs = 1
    for i, (lhs_axis, rhs_axis, out_axis) in enumerate(
        zip(numbers.lhs_spec[2:], numbers.rhs_spec[2:], numbers.out_spec[2:], strict=True)
    ):
        pairs *= _conv_pairs(
            lhs[lhs_axis],
            rhs[rhs_axis],
            out[out_axis],
            stride=params["window_strides"][i],
            padding=params["padding"][i],
            lhs_dilation=params["lhs_dilation"][i],
            rhs_dilation=params["rhs_dilation"][i],
        )
    batch, features = (out[axis] for axis in numbers.out_spec[:2])
    return 2 * batch * features * rhs[numbers.rhs_spec[1]] * pairs


def _conv_pairs(
    lhs_size: int,
    rhs_size: int,
    out_size: int,
    *,
    stride: int,
    padding: Sequence[int],
    lhs_dilation: int,
    rhs_dilation: int,
) -> int:
    """Pairs (output position, kernel tap) of one spatial axis that meet an input element."""
    outputs = np.arange(out_size)[:, None] * stride
    taps = np.arange(rhs_size)[None, :] * rhs_dilation
    position = outputs + taps - padding[0]
    inside = (position >= 0) & (position <= (lhs_size - 1) * lhs_dilation)
    return int(np.count_nonzero(inside & (position % lhs_dilation == 0)))
