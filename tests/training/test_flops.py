"""Counted FLOPs against hand counts and against XLA's own analysis of unrolled programs."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from mplug_jax.training.flops import matmul_flops


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def xla_flops(fn, *args):
    return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]


def test_plain_and_batched_products():
    assert matmul_flops(jnp.matmul, array(5, 7), array(7, 3)) == 2 * 5 * 7 * 3
    assert matmul_flops(jnp.dot, array(7), array(7)) == 2 * 7
    attention = "bqhd,bkhd->bhqk"
    count = matmul_flops(
        lambda q, k: jnp.einsum(attention, q, k), array(2, 5, 3, 8), array(2, 6, 3, 8)
    )
    assert count == 2 * (2 * 3) * 5 * 6 * 8


def test_element_wise_work_counts_nothing():
    assert matmul_flops(lambda x: jax.nn.softmax(jnp.exp(x)).sum(), array(100, 100)) == 0


def test_trees_and_jit_are_seen_through():
    params = {"a": array(4, 8), "b": array(8, 2)}
    fn = jax.jit(lambda p, x: jax.jit(jnp.matmul)(x @ p["a"], p["b"]))
    assert matmul_flops(fn, params, array(3, 4)) == 2 * 3 * 4 * 8 + 2 * 3 * 8 * 2


def layer(x, w):
    return jnp.tanh(x @ w), None


def stack(ws, x):
    return jax.lax.scan(layer, x, ws)[0]


def unrolled(ws, x):
    for w in ws:
        x = layer(x, w)[0]
    return x


def test_scan_counts_its_length_where_xla_counts_one():
    ws, x = array(6, 32, 32), array(16, 32)
    once = 2 * 16 * 32 * 32
    assert matmul_flops(stack, ws, x) == 6 * once
    assert xla_flops(stack, ws, x) < 2.5 * once  # the reason for this module


def test_nested_scans_multiply():
    def outer(ws, x):
        return jax.lax.scan(lambda c, _: (stack(ws, c), None), x, length=5)[0]

    assert matmul_flops(outer, array(3, 8, 8), array(2, 8)) == 15 * 2 * 2 * 8 * 8


def test_fori_loop_with_known_bounds_counts_each_turn():
    fn = lambda w, x: jax.lax.fori_loop(0, 7, lambda _, c: c @ w, x)  # noqa: E731
    assert matmul_flops(jax.grad(lambda w, x: fn(w, x).sum()), array(8, 8), array(2, 8)) == (
        3 * 7 * 2 * 2 * 8 * 8
    )


def test_while_counts_condition_and_body_once():
    def fn(w, x):
        return jax.lax.while_loop(lambda c: (c @ c.T).sum() < 9, lambda c: c @ w, x)

    assert matmul_flops(fn, array(8, 8), array(2, 8)) == 2 * 2 * 2 * 8 + 2 * 2 * 8 * 8


def test_cond_counts_its_dearest_branch():
    def fn(flag, x):
        return jax.lax.cond(flag, lambda y: y @ y, lambda y: y @ y @ y, x)

    assert matmul_flops(fn, array(dtype=bool), array(8, 8)) == 2 * 2 * 8**3


@pytest.mark.parametrize("forward", [stack, unrolled])
def test_gradients_of_a_stack_are_three_times_forward(forward):
    """Less the gradient of the data in the unrolled one; the scan computes that one too."""
    layers, batch, width = 4, 16, 32
    once = 2 * batch * width * width

    def loss(ws, x):
        return forward(ws, x).sum()

    count = matmul_flops(jax.value_and_grad(loss), array(layers, width, width), array(batch, width))
    both = matmul_flops(
        jax.value_and_grad(loss, (0, 1)), array(layers, width, width), array(batch, width)
    )
    assert both == 3 * layers * once
    assert count == (3 * layers - 1) * once if forward is unrolled else both


def test_rematerialisation_counts_what_it_computes_again():
    """What is computed again is the product; only its output's consumer, tanh, needs it."""
    w, x = array(32, 32), array(16, 32)
    once = 2 * 16 * 32 * 32

    def loss(fn):
        return lambda w, x: fn(w, x).sum()

    plain = lambda w, x: jnp.tanh(x @ w)  # noqa: E731
    assert matmul_flops(jax.value_and_grad(loss(plain)), w, x) == 2 * once
    assert matmul_flops(jax.value_and_grad(loss(jax.checkpoint(plain))), w, x) == 3 * once


def test_custom_derivatives_are_seen_through():
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))

    @jax.custom_jvp
    def square(x):
        return x @ x

    square.defjvp(lambda primals, tangents: (square(*primals), tangents[0] @ primals[0]))
    once = 2 * 16 * 32 * 8
    assert matmul_flops(product, array(16, 32), array(32, 8)) == once
    gradient = jax.value_and_grad(lambda x, w: product(x, w).sum(), (0, 1))
    assert matmul_flops(gradient, array(16, 32), array(32, 8)) == 3 * once
    assert matmul_flops(square, array(8, 8)) == 2 * 8**3
    assert matmul_flops(jax.value_and_grad(lambda x: square(x).sum()), array(8, 8)) == 4 * 8**3


def test_shard_map_counts_all_shards():
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    rows, whole = PartitionSpec("data"), PartitionSpec()

    def product(**options):
        return jax.shard_map(
            jnp.matmul, mesh=mesh, in_specs=(rows, whole), out_specs=rows, **options
        )

    once = 2 * 16 * 32 * 8
    # Over one axis alone the work is that of the whole product; over both it is done twice, once
    # for each place on the axis that nothing is split over.
    one_axis = jax.jit(product(axis_names={"data"}))
    assert matmul_flops(one_axis, array(16, 32), array(32, 8)) == once
    assert matmul_flops(product(), array(16, 32), array(32, 8)) == 2 * once


def conv(stride, padding, groups=1, dilation=1):
    def fn(x, w):
        return jax.lax.conv_general_dilated(
            x,
            w,
            (stride, stride),
            padding,
            rhs_dilation=(dilation, dilation),
            feature_group_count=groups,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    return fn


def test_patch_convolution_is_a_matrix_product():
    count = matmul_flops(conv(16, "VALID"), array(2, 64, 48, 3), array(16, 16, 3, 768))
    assert count == 2 * (2 * 4 * 3) * (16 * 16 * 3) * 768


def test_gradient_of_the_patch_kernel_costs_one_more_pass():
    x, w = array(2, 32, 32, 3), array(8, 8, 3, 16)
    forward = matmul_flops(conv(8, "VALID"), x, w)
    both = matmul_flops(jax.value_and_grad(lambda w, x: conv(8, "VALID")(x, w).sum()), w, x)
    assert both == 2 * forward


@pytest.mark.parametrize(
    ("stride", "padding", "groups", "dilation"),
    [(1, "SAME", 1, 1), (2, "SAME", 1, 1), (2, [(0, 1), (2, 1)], 2, 1), (1, "VALID", 1, 2)],
)
def test_convolutions_and_their_gradients_equal_xla(stride, padding, groups, dilation):
    fn = conv(stride, padding, groups, dilation)
    x, w = array(2, 9, 12, 4), array(3, 3, 4 // groups, 6)
    assert matmul_flops(fn, x, w) == xla_flops(fn, x, w)
    gradients = jax.grad(lambda x, w: (fn(x, w) ** 2).sum(), (0, 1))
    count, measured = matmul_flops(gradients, x, w), xla_flops(gradients, x, w)
    assert count == pytest.approx(measured, rel=0.05)
    assert count == 3 * matmul_flops(fn, x, w)


def test_unrolled_mlp_equals_xla_within_percents():
    ws, x = array(3, 128, 128), array(64, 128)

    def loss(ws, x):
        return (unrolled(ws, x) ** 2).mean()

    step = jax.value_and_grad(loss)
    assert matmul_flops(loss, ws, x) == pytest.approx(xla_flops(loss, ws, x), rel=0.03)
    assert matmul_flops(step, ws, x) == pytest.approx(xla_flops(step, ws, x), rel=0.03)
