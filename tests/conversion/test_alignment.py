"""Towers that have never met: what their alignment finds, keeps, and writes."""

import json
import re

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image

from mplug_jax.conversion.alignment import procrustes
from mplug_jax.conversion.report import ConversionError
from mplug_jax.convert import run
from mplug_jax.training.checkpoint import read_params
from tests.conversion.test_convert import CONFIG, FIXTURES

SHARED = 6
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "cat", "on", "grass"]


def pairs(count, width, words_width, seed=0):
    """Tokens and words of pairs: what the two share, mixed up and drowned in each one's own."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99)
    shared = rng.normal(size=(count, 1, SHARED))

    def stream(length, size):
        own = rng.normal(size=(count, length, size)) * np.linspace(0.1, 1, size)
        return own + 2 * shared @ mixing.normal(size=(SHARED, size)) + 5

    images, texts = stream(9, width), stream(7, words_width)
    mask = np.arange(7) < rng.integers(3, 8, size=(count, 1))
    return images.astype(np.float32), texts.astype(np.float32), mask


def bridged(alignment, tokens):
    return tokens @ alignment.kernel + alignment.bias


def centred(x):
    return x - x.mean(axis=0)


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize(("width", "words_width"), [(24, 24), (32, 20), (20, 32)])
def test_pictures_find_their_captions_among_others_that_were_not_aligned_by(width, words_width):
    alignment = procrustes(*pairs(400, width, words_width))
    images, texts, mask = pairs(100, width, words_width, seed=1)

    shown = centred(bridged(alignment, images).mean(axis=1))
    told = centred((texts * mask[..., None]).sum(axis=1) / mask.sum(axis=1, keepdims=True))
    whiten = np.linalg.inv(np.linalg.cholesky(np.cov(texts[mask].T) + 0.1 * np.eye(words_width)))
    scores = unit(shown @ whiten.T) @ unit(told @ whiten.T).T
    assert (scores.argmax(axis=1) == np.arange(100)).mean() > 0.5  # by chance 0.01
    assert 0.5 < alignment.agreement <= 1


def test_nothing_is_lost_and_the_tokens_spread_as_the_words_do():
    images, texts, mask = pairs(600, 24, 24)
    alignment = procrustes(images, texts, mask)
    tokens = bridged(alignment, images.reshape(-1, 24))
    words = texts[mask]

    np.testing.assert_allclose(tokens.mean(axis=0), words.mean(axis=0), atol=1e-2)
    assert np.linalg.cond(alignment.kernel) < 1e3
    # Shrinkage takes a little from the directions that had little.
    got, want = np.cov(tokens.T), np.cov(words.T)
    assert np.linalg.norm(got - want) < 0.25 * np.linalg.norm(want)
    assert alignment.scale == pytest.approx(np.sqrt(np.mean(words**2)), rel=1e-5)


def test_tokens_without_any_spread_stay_finite():
    images, texts, mask = pairs(50, 8, 8)
    images[..., 3] = 1.0
    texts[..., 5] = 0.0
    alignment = procrustes(images, texts, mask)
    assert np.isfinite(alignment.kernel).all() and np.isfinite(alignment.agreement)


@pytest.fixture
def photos(tmp_path):
    """Eight pictures with captions, BERT's vocabulary cut short, and the config's file."""
    rng, rows = np.random.default_rng(0), []
    for i in range(8):
        pixels = rng.integers(0, 255, (12, 12, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "caption": ["a dog on grass", "a cat"]})
    (tmp_path / "train.json").write_text(json.dumps(rows))
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    source = """
    config.data.train = ({"kind": "retrieval", "path": "train.json"},)
    config.data.tokenizer.update({"kind": "wordpiece", "path": "vocab.txt"})
    config.data.text_length = 8
    return config
"""
    (tmp_path / "photos.py").write_text(CONFIG.replace("    return config\n", source))
    return tmp_path


def towers(folder, *arguments):
    return run(
        [
            "convert",
            "towers",
            f"--vision={FIXTURES / 'dinov2.safetensors'}",
            f"--config={folder / 'photos.py'}:dinov2",
            f"--config.data.root={folder}",
            f"--out={folder / 'run'}",
            *arguments,
        ]
    )


def test_the_command_fills_bridge_and_cross_attention(photos):
    text = towers(
        photos,
        f"--text={FIXTURES / 'bert.safetensors'}",
        "--config.model.bridge=True",
        "--align=6",
    )
    assert re.search(r"aligned by 6 pairs: cosine 0\.\d+ between", text)
    params, _ = read_params(photos / "run")
    assert np.abs(params["bridge"]["dense"]["bias"]).max() > 0
    scale = params["bridge"]["layer_norm"]["scale"]
    assert np.ptp(scale) == 0 and scale[0] != 1
    fused, decoder = params["fusion"]["layer_0"], params["decoder"]["blocks"]
    for layer in (fused, decoder):
        for cross, own in (
            ("cross_attention", "attention"),
            ("after_cross_attention", "after_attention"),
        ):
            theirs = flatten_dict(layer[own])
            for path, array in flatten_dict(layer[cross]).items():
                np.testing.assert_array_equal(array, theirs[path])
    account = (photos / "run" / "conversion.txt").read_text()
    assert re.search(r"bridge/dense/kernel.*: set by --align", account)
    assert re.search(r"cross_attention/.*: by --align a copy", account)


def test_what_alignment_needs_is_told(photos):
    bert = f"--text={FIXTURES / 'bert.safetensors'}"
    with pytest.raises(ConversionError, match=r"--align fills the bridge.*model\.bridge=True"):
        towers(photos, bert, "--align=6")
    with pytest.raises(ConversionError, match="--align needs both towers"):
        towers(photos, "--config.model.bridge=True", "--align=6")
