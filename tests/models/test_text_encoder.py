"""The text encoder against NumPy, and what padding may not do."""

import jax
import numpy as np
import pytest

from mplug_jax.models.text_encoder import TextEncoder

IDS = np.array([[2, 9, 14, 3, 0, 0], [2, 7, 5, 11, 28, 3], [2, 3, 0, 0, 0, 0]])
MASK = IDS > 0


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_text_encoder_is_the_numpy_one_and_padding_changes_nothing(
    small, params_of, reference, norm
):
    config = small.replace(text={"norm": norm})
    params = params_of(config)["text_encoder"]
    run = jax.jit(TextEncoder(config.text).apply)
    got = run({"params": params}, IDS, MASK)
    want = reference.text_encoder(params, IDS, MASK, config.text)
    np.testing.assert_allclose(got, want, atol=1e-4)

    other = np.where(MASK, IDS, 17)
    padded = run({"params": params}, other, MASK)
    np.testing.assert_array_equal(padded[MASK], got[MASK])
    # The same tokens, seen: now they matter.
    seen = run({"params": params}, other, np.ones_like(MASK))
    assert np.abs(seen[0, :4] - got[0, :4]).max() > 0.01


def test_each_block_is_in_the_intermediates(small, params_of):
    module = TextEncoder(small.text)
    variables = {"params": params_of(small)["text_encoder"]}
    out, state = jax.jit(lambda v: module.apply(v, IDS, MASK, mutable=["intermediates"]))(variables)
    blocks = state["intermediates"]["blocks"]["output"][0]
    assert blocks.shape == (small.text.depth, *IDS.shape, small.text.width)
    np.testing.assert_array_equal(blocks[-1], out)
