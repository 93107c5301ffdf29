"""BERT files against the outputs of Hugging Face's BertForPreTraining (recipe: see the image
encoders' test), and which layers go where."""

from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest

from mplug_jax.conversion.bert import fill_text_towers
from mplug_jax.conversion.reading import read_weights
from mplug_jax.conversion.report import ConversionError
from mplug_jax.conversion.transfer import Filling
from mplug_jax.models.config import (
    DecoderConfig,
    FusionConfig,
    ModelConfig,
    TextConfig,
    VisionConfig,
)
from mplug_jax.models.mplug import MPlug

FIXTURES = Path(__file__).parent / "fixtures"
CONFIG = ModelConfig(
    vision=VisionConfig(
        image_size=(4, 4), patch_size=(4, 4), width=16, depth=1, heads=2, mlp_dim=8
    ),
    text=TextConfig(
        vocab_size=29, width=16, depth=3, heads=2, mlp_dim=24, max_positions=11, dropout=0.0
    ),
    fusion=FusionConfig(depth=2, stride=1),  # cross, connected
    decoder=DecoderConfig(depth=2),
    embed_dim=4,
)


@pytest.fixture
def tensors():
    return read_weights(FIXTURES / "bert.safetensors").tensors


def account(tensors, config=CONFIG):
    return fill_text_towers(Filling(config), tensors)


def filled(tensors, config=CONFIG):
    filling = Filling(config)
    report = fill_text_towers(filling, tensors)
    filling.settle(report, "not given")
    return filling.complete(0), report


def kernel(tensors, layer):
    return tensors[f"bert.encoder.layer.{layer}.intermediate.dense.weight"].T


def without_prefix(tensors):
    return {name.removeprefix("bert."): array for name, array in tensors.items()}


def old_names(tensors):
    swap = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    result = {}
    for name, array in tensors.items():
        for new, old in swap.items():
            name = name.replace(new, old)
        result[name] = array
    return result


@pytest.mark.parametrize("change", [dict, without_prefix, old_names])
def test_hidden_states_and_logits_are_bert_s(tensors, change):
    params, report = filled(change(tensors))
    report.expect()
    want = np.load(FIXTURES / "bert.npz")

    @jax.jit
    def run(params):
        def both(m):
            hidden = m.encode_text(want["ids"], want["mask"])
            return hidden, m.mlm_logits(hidden)

        return nn.apply(both, MPlug(CONFIG))({"params": params})

    hidden, logits = run(params)
    mask = want["mask"]
    np.testing.assert_allclose(hidden[mask], want["hidden"][mask], atol=2e-5)
    np.testing.assert_allclose(logits[mask], want["logits"][mask], atol=1e-4)


def test_which_layer_goes_where_and_what_stays_at_init(tensors):
    params, report = filled(tensors)
    report.expect()
    for i in range(3):
        up = params["text_encoder"]["blocks"]["mlp"]["up"]["kernel"]
        np.testing.assert_array_equal(up[i], kernel(tensors, i))
    for i in range(2):
        np.testing.assert_array_equal(
            params["fusion"][f"layer_{i}"]["mlp"]["up"]["kernel"], kernel(tensors, 1 + i)
        )
        up = params["decoder"]["blocks"]["mlp"]["up"]["kernel"]
        np.testing.assert_array_equal(up[i], kernel(tensors, i))
    words = tensors["bert.embeddings.word_embeddings.weight"]
    for part in ("text_encoder", "decoder"):
        np.testing.assert_array_equal(params[part]["embeddings"]["word"]["embedding"], words)
    head = tensors["cls.predictions.transform.dense.weight"].T
    for place in (params["mlm_head"], params["decoder"]["head"]):
        np.testing.assert_array_equal(place["transform"]["kernel"], head)
    why = report.initial
    assert why["decoder/blocks/cross_attention/query/kernel"] == "BERT has no cross-attention"
    assert why["fusion/layer_0/cross_attention/out/bias"] == "BERT has no cross-attention"
    assert not any(place.startswith(("fusion/layer_1", "text_encoder")) for place in why)
    assert why["itm_head/kernel"] == "not given"
    assert set(report.unused.values()) == {
        "BERT's pooler, which mPLUG does not use",
        "next-sentence head, which mPLUG has none of",
    }


def test_a_decoder_deeper_than_bert_gets_the_layers_there_are(tensors):
    config = CONFIG.replace(decoder={"depth": 4}, fusion={"depth": 4, "stride": 3})
    params, report = filled(tensors, config)
    report.expect()
    up = params["decoder"]["blocks"]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(up[2], kernel(tensors, 2))
    assert report.initial["decoder/blocks/mlp/up/kernel [3]"] == "this BERT has 3 layers only"
    assert "decoder/blocks/mlp/up/kernel [2]" not in report.initial
    assert report.initial["fusion/layer_0/mlp/up/kernel"] == "this BERT has 3 layers only"
    np.testing.assert_array_equal(
        params["fusion"]["layer_1"]["mlp"]["up"]["kernel"], kernel(tensors, 0)
    )


def test_a_text_encoder_deeper_than_bert_is_refused(tensors):
    report = account(tensors, CONFIG.replace(text={"depth": 4}))
    with pytest.raises(ConversionError, match=r"not in the file: text_encoder/blocks/.* \[3\]"):
        report.expect()


def test_a_bert_without_a_head(tensors):
    tensors = {n: a for n, a in without_prefix(tensors).items() if not n.startswith("cls.")}
    report = account(tensors)
    report.expect()
    assert report.initial["mlm_head/bias"] == "the file has no prediction head"


def test_a_tied_copy_of_the_embeddings_must_be_one(tensors):
    words = tensors["bert.embeddings.word_embeddings.weight"]
    account(tensors | {"cls.predictions.decoder.weight": words.copy()}).expect()
    report = account(tensors | {"cls.predictions.decoder.weight": words + 1})
    with pytest.raises(ConversionError, match="differs from the word embeddings"):
        report.expect()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "pre"}, "set it to 'post'"),
        ({"qk_norm": True}, "set it to False"),
        ({"width": 32}, "text.width: 16 in the file, 32 in the config"),
        ({"vocab_size": 30}, "text.vocab_size: 29 in the file, 30 in the config"),
    ],
)
def test_a_config_of_another_bert_is_refused(tensors, change, message):
    with pytest.raises(ConversionError, match=message):
        account(tensors, CONFIG.replace(text=change))


def test_a_file_without_bert_is_refused():
    with pytest.raises(ConversionError, match="holds no BERT"):
        account({"visual.conv1.weight": np.zeros(1)})
