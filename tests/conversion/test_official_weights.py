"""Official state dicts: their names, their sizes, what is dead in them, and the way back."""

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from mplug_jax.conversion.official import (
    export_params,
    fine_tuning_name,
    fine_tuning_names,
    import_params,
    rename,
    state_dict,
)
from mplug_jax.conversion.official_sizes import model_config_from, read_sizes
from mplug_jax.conversion.report import ConversionError
from mplug_jax.models.config import preset

# Pairs that the official fine-tuning loop itself gave: (in the file, in the model or dropped).
OFFICIAL_RENAMING = (
    (
        "text_encoder.bert.encoder.layer.0.attention.self.query.weight",
        "text_encoder.encoder.layer.0.attention.self.query.weight",
    ),
    (
        "text_encoder.bert.embeddings.word_embeddings.weight",
        "text_encoder.embeddings.word_embeddings.weight",
    ),
    ("text_encoder.cls.predictions.bias", "text_encoder.cls.predictions.bias"),
    (
        "fusion_encoder.fusion.encoder.layer.6.crossattention.self.key.weight",
        "fusion_encoder.encoder.layer.6.crossattention.self.key.weight",
    ),
    (
        "fusion_encoder.bert.encoder.layer.6.attention.self.key.bias",
        "fusion_encoder.encoder.layer.6.attention.self.key.bias",
    ),
    ("fusion_encoder.cls.predictions.bias", None),
    (
        "text_decoder.bert.encoder.layer.0.attention.self.query.weight",
        "text_decoder.bert.encoder.layer.0.attention.self.query.weight",
    ),
    (
        "text_decoder.cls.predictions.decoder.weight",
        "text_decoder.cls.predictions.decoder.weight",
    ),
    ("visual_encoder.visual.conv1.weight", "visual_encoder.visual.conv1.weight"),
    (
        "text_encoder_m.bert.encoder.layer.0.output.dense.bias",
        "text_encoder_m.encoder.layer.0.output.dense.bias",
    ),
    (
        "text_decoder_m.bert.embeddings.LayerNorm.weight",
        "text_decoder_m.bert.embeddings.LayerNorm.weight",
    ),
    ("fusion_encoder.encoder.layer.6.attention.self.query.weight", None),
    ("visn_fc.weight", "visn_fc.weight"),
    ("visn_layer_norm.bias", "visn_layer_norm.bias"),
    ("vision_proj.weight", "vision_proj.weight"),
    ("temp", "temp"),
)


def same(actual, expected) -> None:
    a, b = flatten_dict(actual), flatten_dict(expected)
    assert a.keys() == b.keys()
    for name, array in b.items():
        assert (a[name].dtype, a[name].shape) == (array.dtype, array.shape)
        assert a[name].tobytes() == array.tobytes()


@pytest.mark.parametrize(("name", "renamed"), OFFICIAL_RENAMING)
def test_names_change_as_in_the_official_scripts(name, renamed):
    assert fine_tuning_name(name) == renamed


def test_a_fine_tuned_file_keeps_its_fusion_network(small):
    plain, notes = fine_tuning_names(small.state)
    assert plain.keys() == small.state.keys() and not notes


def test_pre_training_names_are_recognised(small):
    def pre_training(name):
        for part, word in (("text_encoder", "bert"), ("fusion_encoder", "fusion")):
            for group in ("embeddings", "encoder"):
                name = name.replace(f"{part}.{group}.", f"{part}.{word}.{group}.")
        return name

    state = {pre_training(name): array for name, array in small.state.items()}
    assert sum(name not in small.state for name in state) > 100
    params, report = import_params(state, small.config)
    report.expect()
    same(params, small.params)
    assert "renamed" in report.notes[0]


def test_there_and_back_gives_the_same_bytes(small):
    config = model_config_from(small.state, like=small.config)
    params, report = import_params(small.state, config)
    report.expect()
    assert not report.initial
    same(params, small.params)
    back = state_dict(params, config)
    same(back, {name: small.state[name] for name in back})
    assert small.state.keys() - back.keys() <= report.unused.keys()


def test_every_tensor_is_accounted_for_with_a_reason(small):
    _, report = import_params(small.state, small.config)
    assert report.used.keys() | report.unused.keys() == small.state.keys()
    assert not report.used.keys() & report.unused.keys()
    filled = {place.split(" [")[0] for places in report.used.values() for place in places}
    assert filled == set(flatten_dict(small.params, sep="/"))
    unused = report.unused
    assert "never run" in unused["fusion_encoder.encoder.layer.8.attention.self.query.weight"]
    assert "connected" in unused["fusion_encoder.encoder.layer.11.crossattention.self.key.bias"]
    assert "text tower" in unused["visual_encoder.transformer.resblocks.0.ln_1.weight"]
    assert "tied" in unused["text_decoder.cls.predictions.decoder.weight"]
    assert "twin" in unused["vision_proj_m.weight"]
    assert "queue" in unused["image_queue"]


def test_arrays_lie_as_torch_multiplies_them(small):
    """y = x W^T + b, heads one after another; in_proj holds query, key, value in this order."""
    rng = np.random.default_rng(0)
    p, s, x = small.params, small.state, rng.normal(size=(4, 12)).astype(np.float32)
    prefix = "visual_encoder.visual.transformer.resblocks.1.attn."
    packed = x @ s[f"{prefix}in_proj_weight"].T + s[f"{prefix}in_proj_bias"]
    for i, name in enumerate(("query", "key", "value")):
        ours = p["visual_encoder"]["blocks"]["attention"][name]
        got = np.einsum("nd,dhk->nhk", x, ours["kernel"][1]) + ours["bias"][1]
        np.testing.assert_allclose(got.reshape(4, 12), packed[:, 12 * i : 12 * i + 12], atol=1e-5)
    ours = p["decoder"]["blocks"]["cross_attention"]["out"]
    y, prefix = rng.normal(size=(4, 16)), "text_decoder.bert.encoder.layer.0.crossattention.output."
    got = np.einsum("nhk,hkd->nd", y.reshape(4, 2, 8), ours["kernel"][0]) + ours["bias"][0]
    np.testing.assert_allclose(
        got, y @ s[f"{prefix}dense.weight"].T + s[f"{prefix}dense.bias"], atol=1e-5
    )
    patch = rng.normal(size=(3, 4, 4))  # channels first
    got = np.einsum("crs,rscd->d", patch, p["visual_encoder"]["patch_embedding"]["kernel"])
    want = np.einsum("crs,dcrs->d", patch, s["visual_encoder.visual.conv1.weight"])
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_sizes_are_read_off_the_tensors(small):
    sizes = read_sizes(small.state, given={"fusion.stride": 2, "fusion.depth": 3})
    flat = {
        "vision.image_size": (12, 12),
        "vision.patch_size": (4, 4),
        "vision.width": 12,
        "vision.depth": 2,
        "vision.mlp_dim": 20,
        "text.vocab_size": 29,
        "text.width": 16,
        "text.depth": 2,
        "text.mlp_dim": 24,
        "text.max_positions": 11,
        "text.type_vocab_size": 2,
        "decoder.depth": 2,
        "embed_dim": 5,
    }
    assert sizes.shown == flat
    assert sizes.config.vision.heads == sizes.config.text.heads == 1  # narrower than one of 64
    assert any("last 3 of the file's 12 layers" in note for note in sizes.notes)


def test_a_file_without_dead_weights_shows_its_fusion_schedule(small):
    sizes = read_sizes(small.live)
    assert (sizes.config.fusion.depth, sizes.config.fusion.stride) == (3, 2)
    odd = {n: a for n, a in small.live.items() if "layer.9.crossattention" not in n}
    with pytest.raises(ConversionError, match=r"\[0, 2\] of 3 have no cross-attention"):
        read_sizes(odd)


@pytest.mark.parametrize(("width", "stride"), [(768, 3), (1024, 6)])
def test_the_stride_of_the_released_models_follows_from_their_width(small, width, stride):
    """Only shapes matter here, so the tensors hold nothing."""

    def blank(*shape):
        return np.broadcast_to(np.float32(0), shape)

    vision = "visual_encoder.visual."
    state = {
        f"{vision}conv1.weight": blank(width, 3, 14, 14),
        f"{vision}positional_embedding": blank(257, width),
        f"{vision}transformer.resblocks.0.mlp.c_fc.weight": blank(4 * width, width),
        "text_encoder.embeddings.word_embeddings.weight": blank(30522, 768),
        "text_encoder.embeddings.position_embeddings.weight": blank(512, 768),
        "text_encoder.embeddings.token_type_embeddings.weight": blank(2, 768),
        **{
            f"fusion_encoder.encoder.layer.{i}.crossattention.self.query.weight": 0
            for i in range(12)
        },
    }
    sizes = read_sizes(state)
    assert (sizes.config.fusion.depth, sizes.config.fusion.stride) == (6, stride)
    assert sizes.config.vision.heads == width // 64 and sizes.config.text.heads == 12
    assert any(f"fusion.stride={stride}" in note for note in sizes.notes)
    state[f"{vision}conv1.weight"] = blank(96, 3, 14, 14)
    with pytest.raises(ConversionError, match="--fusion_stride"):
        read_sizes(state)


def test_positions_are_resampled_for_another_picture(small):
    config = small.config.replace(vision={"image_size": (20, 8)})
    params, report = import_params(small.state, config)
    report.expect()
    assert params["visual_encoder"]["position_embedding"].shape == (11, 12)
    name = "visual_encoder.visual.positional_embedding"
    assert "from (3, 3) patches to (5, 2)" in report.resized[name]
    np.testing.assert_array_equal(
        params["visual_encoder"]["position_embedding"][0], small.state[name][0]
    )


def test_heads_that_a_task_has_not_stay_at_init(small):
    state = {
        name: array
        for name, array in small.state.items()
        if not name.startswith(
            ("temp", "vision_proj", "text_proj", "itm_head", "fusion_encoder.cls")
        )
    }
    params, report = import_params(state, small.config, seed=4)
    report.expect()
    assert {path.split("/")[0] for path in report.initial} == {
        "temperature",
        "vision_proj",
        "text_proj",
        "itm_head",
        "mlm_head",
    }
    assert params["temperature"] == np.float32(small.config.temperature)
    other, _ = import_params(state, small.config, seed=5)
    assert np.abs(params["itm_head"]["kernel"] - other["itm_head"]["kernel"]).max() > 0
    same({"d": params["decoder"]}, {"d": small.params["decoder"]})


def test_a_missing_tensor_is_named_with_what_comes_closest(small):
    state = dict(small.state)
    state["text_encoder.encoder.layer.1.output.densse.bias"] = state.pop(
        "text_encoder.encoder.layer.1.output.dense.bias"
    )
    _, report = import_params(state, small.config)
    with pytest.raises(ConversionError) as error:
        report.expect()
    text = str(error.value)
    assert "1 unexpected tensors, 1 parameters" in text
    assert (
        "not in the model: text_encoder.encoder.layer.1.output.densse.bias "
        "(closest: text_encoder.encoder.layer.1.output.dense.bias)" in text
    )
    assert (
        "not in the file: text_encoder/blocks/mlp/down/bias [1] = "
        "text_encoder.encoder.layer.1.output.dense.bias "
        "(closest: text_encoder.encoder.layer.1.output.densse.bias)" in text
    )
    report.expect(unused=["densse"], missing=["^text_encoder/blocks/mlp/down/bias"])
    assert (
        "--expect_unused=densse" in report.unused["text_encoder.encoder.layer.1.output.densse.bias"]
    )


def test_an_untied_head_is_not_dropped_in_silence(small):
    state = dict(small.state)
    state["text_decoder.cls.predictions.decoder.weight"] = np.zeros((29, 16), np.float32)
    with pytest.raises(ConversionError, match=r"decoder\.weight"):
        import_params(state, small.config)[1].expect()


def test_wrong_sizes_are_all_listed(small):
    config = small.config.replace(text={"mlp_dim": 20}, embed_dim=4)
    with pytest.raises(ConversionError) as error:
        import_params(small.state, config)
    text = str(error.value)
    assert "vision_proj.weight: (5, 16) in the file, (4, 16) in the model" in text
    assert "text_encoder.encoder.layer.0.intermediate.dense.weight: (24, 16)" in text


def test_momentum_twins(small):
    twins = {
        name if name == "temp" else "_m.".join(name.split(".", 1)): array + 1
        for name, array in small.live.items()
    }
    params, report = import_params(small.state | twins, small.config, suffix="_m")
    assert not report.missing and not report.initial
    want = flatten_dict(small.params)
    for path, array in flatten_dict(params).items():
        np.testing.assert_array_equal(array, want[path] + 1)


def test_gradients_come_out_once_each(small):
    named = export_params(small.params, small.config, fusion_layers=5)
    assert "text_decoder.cls.predictions.decoder.weight" not in named
    layers = {n.split(".")[3] for n in named if n.startswith("fusion_encoder.encoder")}
    assert layers == {"2", "3", "4"}
    count = sum(a.size for a in flatten_dict(small.params).values())
    assert sum(a.size for a in named.values()) == count


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (preset("tiny"), "fusion.schedule='paper'"),
        (preset("base").replace(text={"norm": "pre"}), "text.norm='pre'"),
        (
            preset("base").replace(vision={"activation": "gelu"}),
            "vision.activation='gelu'",
        ),
        (preset("base").replace(text={"qk_norm": True}), "text.qk_norm=True"),
        (preset("base").replace(frames=8, frame_positions=True), "frame_positions=True"),
        (preset("base").replace(vision={"layer_scale": 1.0}), "vision.layer_scale=1.0"),
    ],
)
def test_models_that_the_official_code_has_not_are_refused(config, what):
    for convert in (state_dict, import_params):
        with pytest.raises(ConversionError, match=rf"no model with .*model\.{what} \(theirs: "):
            convert({}, config)


def test_renaming_by_prefix():
    tensors = {"a.b.x": 1, "a.y": 2, "c": 3}
    assert rename(tensors, {"a.b.": "p.", "a.": "q."}) == {"p.x": 1, "q.y": 2, "c": 3}
    with pytest.raises(ConversionError, match="two tensors one name"):
        rename({"a.x": 1, "b.x": 2}, {"a.": "b."})


def test_something_else_is_no_mplug(small):
    with pytest.raises(ConversionError, match=r"no mPLUG state dict.*first names: a, b"):
        read_sizes({"a": np.zeros(1), "b": np.zeros(1)})
    holed = {n: a for n, a in small.state.items() if "text_encoder.encoder.layer.0." not in n}
    with pytest.raises(ConversionError, match="number 0 is missing"):
        read_sizes(holed)
