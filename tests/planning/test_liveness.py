"""The walk against hand-worked programs."""

import jax
import jax.numpy as jnp

from mplug_jax.planning.liveness import bytes_of, usage

SIDE = 32
MATRIX = 4 * SIDE * SIDE
X = jax.ShapeDtypeStruct((SIDE, SIDE), jnp.float32)


def peak(fn, *args, **options):
    return usage(jax.make_jaxpr(fn)(*args).jaxpr, bytes_of, **options).peak


def test_inputs_and_outputs_lie_elsewhere():
    assert peak(lambda x: x @ x, X) == 0


def test_a_result_lives_until_it_was_read():
    # a is read by b and c; b and c by the product that is returned: three at once.
    def three(x):
        a = x @ x
        b, c = a @ x, x @ a
        return b @ c

    assert peak(three, X) == 3 * MATRIX
    # A chain holds what it reads and what it writes.
    assert peak(lambda x: x @ x @ x @ x, X) == 2 * MATRIX


def test_element_wise_work_is_fused_into_a_reduction():
    assert peak(lambda x: jnp.sum(jnp.abs(x + 1.0) * 2.0), X) == 0


def test_element_wise_work_is_written_for_a_product():
    assert peak(lambda x: (x + 1.0) @ x, X) == MATRIX


def test_what_fused_work_reads_stays_alive_for_its_reader():
    def fn(x):
        a = x @ x
        b = a + 1.0  # fused: its reader at the end needs a itself
        c = x @ x.T
        return jnp.sum(c @ c) + jnp.sum(b)

    assert peak(fn, X) == 3 * MATRIX


def test_unused_work_is_left_out():
    def fn(x):
        _ = (x @ x) @ (x @ x)
        return x @ x

    assert peak(fn, X) == 0


def test_a_call_is_written_out_and_a_scan_keeps_what_it_stacks():
    inner = jax.jit(lambda x: x @ x)
    assert peak(lambda x: inner(inner(x)), X) == MATRIX

    def loop(x):
        _, kept = jax.lax.scan(lambda c, _: (c @ x, c @ c @ c), x, None, length=5)
        return jnp.sum(kept)

    # The stack of five and the last carry; inside, the next carry and one product on its way.
    assert peak(loop, X) == 8 * MATRIX


def test_remat_holds_less_unless_equal_work_is_merged():
    def layer(x):
        return jnp.tanh(jnp.tanh(x @ x) @ x) @ x

    def loss(policy, x):
        for _ in range(4):
            x = policy(layer)(x)
        return jnp.sum(x)

    plain = peak(jax.grad(lambda x: loss(lambda f: f, x)), X)
    remat = jax.grad(lambda x: loss(jax.checkpoint, x))
    assert peak(remat, X) < 0.8 * plain
    assert peak(remat, X, merged=True) >= 0.95 * plain


def test_traffic_counts_a_loop_by_its_turns():
    def loop(turns):
        def fn(x):
            return jax.lax.scan(lambda c, _: (c @ x, None), x, None, length=turns)[0]

        return usage(jax.make_jaxpr(fn)(X).jaxpr, bytes_of).traffic

    assert loop(10) == 10 * loop(1)
