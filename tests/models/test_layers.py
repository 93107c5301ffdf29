"""Blocks against NumPy, dropout, and what the compute type leaves in float32."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mplug_jax.models.layers import (
    ACTIVATIONS,
    MLP,
    Attention,
    Dropout,
    LMHead,
    Residual,
    TextEmbeddings,
    layer_norm,
)


def draws(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def filled(module, *args, seed=1):
    """Random parameters of a module, biases included."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(np.float32), nn.meta.unbox(shapes)
    )


@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_is_the_textbook_one(reference, qk_norm):
    module = Attention(width=12, heads=3, qk_norm=qk_norm)
    x, memory = draws(2, 5, 12), draws(2, 7, 12, seed=2)
    mask = np.random.default_rng(3).random((2, 1, 5, 7)) < 0.6
    mask[..., 0] = True
    params = filled(module, x, memory)
    got = jax.jit(module.apply)({"params": params}, x, memory, mask)
    np.testing.assert_allclose(got, reference.attention(params, x, memory, mask[:, 0]), atol=2e-4)


@pytest.mark.parametrize("query_length", [1, 4])
def test_rows_that_share_keys_equal_tiled_keys(query_length):
    module = Attention(width=12, heads=3)
    x, memory = draws(6, 4, 12), draws(2, 7, 12, seed=2)
    mask = np.random.default_rng(3).random((2, 1, query_length, 7)) < 0.6
    mask[..., 2] = True
    variables = {"params": filled(module, x[:2], memory)}
    run = jax.jit(module.apply)
    tiled = run(variables, x, memory.repeat(3, axis=0), mask.repeat(3, axis=0))
    np.testing.assert_allclose(run(variables, x, memory, mask), tiled, atol=1e-4)


def test_a_row_without_a_visible_key_stays_finite():
    module = Attention(width=4, heads=2)
    x = draws(1, 3, 4)
    variables = {"params": filled(module, x, x)}
    mask = jnp.zeros((1, 1, 1, 3), bool)
    value, grad = jax.jit(jax.value_and_grad(lambda v: module.apply(v, x, x, mask).sum()))(
        variables
    )
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in jax.tree.leaves(grad))


def test_activations_are_exact_and_quick_gelu(reference):
    x = np.linspace(-6, 6, 101, dtype=np.float32)
    np.testing.assert_allclose(ACTIVATIONS["gelu"](x), reference.gelu(x), atol=1e-6)
    np.testing.assert_allclose(ACTIVATIONS["quick_gelu"](x), reference.quick_gelu(x), atol=1e-6)
    # Far enough apart that neither passes for the other, nor for the tanh approximation.
    assert np.abs(reference.gelu(x) - reference.quick_gelu(x)).max() > 0.01
    assert np.abs(reference.gelu(x) - jax.nn.gelu(x, approximate=True)).max() > 1e-4


@pytest.mark.parametrize("eps", [1e-12, 0.5])
def test_layer_norm_and_its_eps(reference, eps):
    x = draws(3, 4, 9) * 0.3 + 2
    params = {"scale": draws(9, seed=5), "bias": draws(9, seed=6)}
    got = layer_norm(eps).apply({"params": params}, x)
    np.testing.assert_allclose(got, reference.layer_norm(params, np.float64(x), eps), atol=2e-5)


def test_layer_norm_of_bfloat16_is_computed_in_float32(reference):
    # Numbers whose differences bfloat16 could not hold: their mean in that type would be wrong.
    x = jnp.asarray([[256.0, 258.0, 260.0, 262.0]], jnp.bfloat16)
    params = {"scale": np.ones(4, np.float32), "bias": np.zeros(4, np.float32)}
    got = layer_norm(1e-5).apply({"params": params}, x)
    assert got.dtype == jnp.float32
    want = reference.layer_norm(params, np.float64(x), 1e-5)
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_mlp(reference, activation):
    module = MLP(width=6, mlp_dim=10, activation=activation)
    x = draws(2, 3, 6)
    params = filled(module, x)
    want = reference.mlp(params, x, getattr(reference, activation))
    np.testing.assert_allclose(module.apply({"params": params}, x), want, atol=1e-4)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_residual_order(reference, norm):
    module = Residual(norm, 1e-12, dropout=0.5)
    x = draws(2, 3, 6)
    params = {"layer_norm": {"scale": draws(6, seed=3), "bias": draws(6, seed=4)}}
    got = module.apply({"params": params}, x, lambda y: y**2)

    def normed(y):
        return reference.layer_norm(params["layer_norm"], np.float64(y), 1e-12)

    want = normed(x + x**2) if norm == "post" else x + normed(x) ** 2
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_dropout_acts_only_with_a_random_stream_and_at_its_rate():
    x = jnp.ones((200, 100))
    module = Dropout(0.3)
    np.testing.assert_array_equal(module.apply({}, x), x)
    dropped = module.apply({}, x, rngs={"dropout": jax.random.key(1)})
    assert abs(float((dropped == 0).mean()) - 0.3) < 0.01  # 3 standard deviations of 20,000 draws
    np.testing.assert_allclose(dropped[dropped != 0], 1 / 0.7, rtol=1e-6)
    again = module.apply({}, x, rngs={"dropout": jax.random.key(1)})
    np.testing.assert_array_equal(dropped, again)


def test_attention_dropout_acts_on_the_weights():
    module = Attention(width=4, heads=1, dropout=0.5)
    x = draws(1, 3, 4)
    variables = {"params": filled(module, x, x)}
    # One key: its weight is 1, so each query gets either nothing of the value or twice of it.
    memory = draws(1, 1, 4, seed=8)
    plain = module.apply(variables, x, memory)
    bias = variables["params"]["out"]["bias"]
    dropped = module.apply(variables, x, memory, rngs={"dropout": jax.random.key(2)})
    for row, full in zip(np.asarray(dropped[0]), np.asarray(plain[0]), strict=True):
        choices = [bias, 2 * (full - bias) + bias]
        assert min(np.abs(row - choice).max() for choice in choices) < 1e-4


def text_embeddings():
    return TextEmbeddings(vocab_size=9, width=6, max_positions=5, dropout=0.5)


def test_text_embeddings_add_positions_and_the_first_type(reference, small):
    ids = np.array([[3, 1, 8], [0, 0, 5]])
    params = filled(text_embeddings(), ids)
    got = text_embeddings().apply({"params": params}, ids)
    np.testing.assert_allclose(got, reference.embeddings(params, ids, small.text), atol=2e-5)
    later = text_embeddings().apply({"params": params}, ids[:, 1:], 1)
    np.testing.assert_allclose(later, got[:, 1:], atol=1e-6)


def test_a_text_longer_than_the_positions_says_what_to_do():
    ids = np.zeros((1, 6), np.int32)
    with pytest.raises(ValueError, match=r"6 tokens .* 5 positions .*text\.max_positions"):
        text_embeddings().init(jax.random.key(0), ids)


def test_lm_head_reads_the_embedding_it_is_given_and_answers_in_float32(reference, small):
    x, embedding = draws(2, 3, 6), draws(9, 6, seed=4)
    head = LMHead(vocab_size=9, width=6)
    params = filled(head, x, embedding)
    got = head.apply({"params": params}, x, embedding)
    np.testing.assert_allclose(got, reference.lm_head(params, x, embedding, small.text), atol=1e-4)
    half = LMHead(vocab_size=9, width=6, dtype=jnp.bfloat16)
    logits = half.apply({"params": params}, jnp.asarray(x, jnp.bfloat16), embedding)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, got, atol=0.3)
