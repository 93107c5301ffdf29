"""The wired model: shapes, types, sizes, axis names, dropout, and what must not change a result."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from mplug_jax.models.config import VisionConfig, preset
from mplug_jax.models.mplug import MPlug, count_params
from mplug_jax.training.sharding import RULES


def quick_key(seed):
    """A key whose draws compile in a fraction of the default kind's time."""
    return jax.random.key(seed, impl="rbg")


def inputs(config):
    height, width = config.vision.image_size
    image = np.random.default_rng(0).integers(0, 256, (3, height, width, 3)).astype(np.uint8)
    ids = np.array([[2, 9, 14, 3, 0], [2, 7, 5, 11, 3], [2, 3, 0, 0, 0]])
    return image, ids, ids > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shapes_and_types(small, shapes_of, dtype):
    config = small.replace(dtype=dtype)
    image, ids, mask = inputs(config)
    params = nn.meta.unbox(shapes_of(config))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}

    out = jax.eval_shape(MPlug(config).apply, {"params": params}, image, ids, mask)
    compute = jnp.dtype(dtype)
    width, vocab = config.text.width, config.text.vocab_size
    single = jnp.dtype("float32")
    assert {name: (x.shape, x.dtype) for name, x in out.items()} == {
        "image_embeds": ((3, 7, width), compute),
        "text_embeds": ((3, 5, width), compute),
        "image_feats": ((3, 5), single),
        "text_feats": ((3, 5), single),
        "fused_image": ((3, 7, width), compute),
        "fused_text": ((3, 5, width), compute),
        "itm_logits": ((3, 2), single),
        "mlm_logits": ((3, 5, vocab), single),
        "decoder_logits": ((3, 5, vocab), single),
        "temperature": ((), single),
    }


def test_bfloat16_stays_near_float64(small, params_of, reference):
    rng, params = np.random.default_rng(2), params_of(small)
    image = rng.normal(size=(3, 8, 18, 3)).astype(np.float32)
    _, ids, mask = inputs(small)

    def forward(model):
        image_embeds, text_embeds = model.encode_image(image), model.encode_text(ids, mask)
        _, fused = model.fuse(image_embeds, text_embeds, mask)
        return model.project_image(image_embeds), model.match(fused), model.mlm_logits(fused)

    half = jax.jit(nn.apply(forward, MPlug(small.replace(dtype="bfloat16"))))({"params": params})

    eye, bridge = params["visual_encoder"], params["bridge"]
    tokens = reference.vit(eye, np.float64(image), small.vision, eye["position_embedding"])
    tokens = reference.layer_norm(
        bridge["layer_norm"], reference.dense(bridge["dense"], tokens), 1e-12
    )
    text = reference.text_encoder(params["text_encoder"], ids, mask, small.text)
    kinds = ("cross", "connected")
    _, fused = reference.fusion(params["fusion"], tokens, text, mask, kinds, True, small.text)
    feats = reference.dense(params["vision_proj"], tokens[:, 0])
    embedding = params["text_encoder"]["embeddings"]["word"]["embedding"]
    exact = (
        feats / np.linalg.norm(feats, axis=-1, keepdims=True),
        reference.dense(params["itm_head"], fused[:, 0]),
        reference.lm_head(params["mlm_head"], fused, embedding, small.text),
    )
    for got, want in zip(half, exact, strict=True):
        assert 1e-4 < np.abs(got - want).mean() / np.abs(want).mean() < 0.05
    np.testing.assert_allclose(np.linalg.norm(half[0], axis=-1), 1, atol=1e-5)


def test_heads_read_the_first_token_and_the_tied_embedding(small, params_of, reference):
    params = params_of(small)
    tokens = np.random.default_rng(1).normal(size=(3, 5, small.text.width)).astype(np.float32)
    run = functools.partial(MPlug(small).apply, {"params": params}, tokens)
    for name, method in (("vision_proj", "project_image"), ("text_proj", "project_text")):
        want = reference.dense(params[name], tokens[:, 0])
        want /= np.linalg.norm(want, axis=-1, keepdims=True)
        np.testing.assert_allclose(run(method=method), want, atol=1e-5)
    np.testing.assert_allclose(
        run(method="match"), reference.dense(params["itm_head"], tokens[:, 0]), atol=1e-4
    )
    embedding = params["text_encoder"]["embeddings"]["word"]["embedding"]
    want = reference.lm_head(params["mlm_head"], tokens, embedding, small.text)
    np.testing.assert_allclose(run(method="mlm_logits"), want, atol=5e-4)


def test_the_width_bridge_is_linear_then_norm_and_only_where_widths_differ(
    small, params_of, shapes_of, reference
):
    params = params_of(small)
    image = inputs(small)[0]

    def both(module, x):
        return module.encode_image(x), module.visual_encoder(x)

    got, tokens = jax.jit(nn.apply(both, MPlug(small)))({"params": params}, image)
    linear = reference.dense(params["bridge"]["dense"], np.float64(tokens))
    want = reference.layer_norm(params["bridge"]["layer_norm"], linear, 1e-12)
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert "bridge" not in shapes_of(small.replace(vision={"width": 16, "heads": 2}))


def test_memory_is_image_then_text(small):
    image, text = np.ones((2, 3, 16), np.float32), np.zeros((2, 2, 16), np.float32)
    text_mask = np.array([[True, False], [True, True]])
    memory, mask = MPlug(small).apply(
        {"params": {"temperature": 0.07}}, image, text, text_mask, method="memory"
    )
    np.testing.assert_array_equal(memory[..., 0], [[1, 1, 1, 0, 0]] * 2)
    np.testing.assert_array_equal(mask, [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])


@pytest.mark.parametrize(("limits", "used"), [(None, 0.7), ((0.001, 0.5), 0.5), ((0.8, 0.9), 0.8)])
def test_temperature_is_clipped_only_when_asked(small, limits, used):
    model = MPlug(small.replace(temperature_range=limits))
    got = model.apply({"params": {"temperature": jnp.float32(0.7)}}, method="temperature")
    assert got == pytest.approx(used)


def loss_and_grads(config, method, *args):
    """The function parameters -> (loss, gradients) of one part of the model."""

    def loss(params):
        out = MPlug(config).apply({"params": params}, *args, method=method)
        return sum(jnp.mean(x**2) for x in jax.tree.leaves(out))

    return jax.value_and_grad(loss)


def matrix_products(function, params):
    return str(jax.make_jaxpr(function)(params)).count("dot_general")


@pytest.fixture(scope="module")
def decoder_step(small, params_of):
    """changes -> ((loss, gradients), number of matrix products) of the decoder, a scan."""
    memory = np.random.default_rng(0).normal(size=(2, 3, small.text.width)).astype(np.float32)
    ids, mask = np.array([[2, 9, 14, 3], [2, 7, 5, 11]]), np.ones((2, 3), bool)
    params = {name: params_of(small)[name] for name in ("decoder", "temperature")}

    def step(**changes):
        function = loss_and_grads(small.replace(**changes), "decode", ids, memory, mask)
        return jax.jit(function)(params), matrix_products(function, params)

    return step


@pytest.fixture(scope="module")
def plain_decoder_step(decoder_step):
    return decoder_step()


def assert_same_step(got, want):
    assert got[0] == pytest.approx(float(want[0]), rel=1e-5)
    for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * np.abs(b).max() + 1e-7)


@pytest.mark.parametrize("policy", ["full", "dots", "dots_no_batch"])
def test_remat_recomputes_and_changes_no_number(decoder_step, plain_decoder_step, policy):
    plain, plain_products = plain_decoder_step
    step, products = decoder_step(remat=policy)
    assert_same_step(step, plain)
    # 'dots' keeps every matrix product; attention's have batch dimensions, so the others don't.
    assert (products > plain_products) == (policy != "dots")


def test_unrolling_the_scan_changes_no_number(decoder_step, plain_decoder_step):
    assert_same_step(decoder_step(scan_unroll=2)[0], plain_decoder_step[0])


@pytest.fixture(scope="module")
def fusion_step(small, params_of):
    """(config, remat) -> (its loss and gradients as a function, parameters)."""
    rng = np.random.default_rng(0)
    image, text = (rng.normal(size=(2, n, small.text.width)).astype(np.float32) for n in (3, 4))

    def step(config, remat):
        params = {name: params_of(config)[name] for name in ("fusion", "temperature")}
        mask = np.ones((2, 4), bool)
        return loss_and_grads(config.replace(remat=remat), "fuse", image, text, mask), params

    return step


@pytest.mark.parametrize("schedule", ["asymmetric", "connected", "co_attention"])
def test_every_kind_of_fusion_layer_is_recomputed(small, fusion_step, schedule):
    config = small.replace(fusion={"schedule": schedule, "depth": 1})
    counts = [matrix_products(*fusion_step(config, remat)) for remat in ("none", "full")]
    assert counts[0] < counts[1]


def test_remat_of_fusion_layers_changes_no_number(small, fusion_step):
    plain, full = (
        jax.jit(function)(params)
        for function, params in (fusion_step(small, remat) for remat in ("none", "full"))
    )
    assert_same_step(full, plain)


def test_dropout_is_where_the_original_has_it(small, params_of):
    image, ids, mask = inputs(small)

    def towers(model):
        return model.visual_encoder(image), model.encode_image(image), model.encode_text(ids, mask)

    def run(changes, **rngs):
        forward = nn.apply(towers, MPlug(small.replace(**changes)))
        return jax.jit(lambda params: forward({"params": params}, rngs=rngs))(params_of(small))

    rates = {
        "image attention": {"vision": {"attention_dropout": 0.5}},
        "text": {"text": {"dropout": 0.5}},
        "text attention": {"text": {"attention_dropout": 0.5}},
    }
    # Every rate set, and no random stream: nothing is dropped.
    quiet = run(
        {
            "vision": {"attention_dropout": 0.5},
            "text": {"dropout": 0.5, "attention_dropout": 0.5},
        }
    )
    moved = {
        name: tuple(
            bool(np.any(a != b))
            for a, b in zip(run(changes, dropout=quick_key(1)), quiet, strict=True)
        )
        for name, changes in rates.items()
    }
    assert moved == {
        "image attention": (True, True, False),
        "text": (False, True, True),  # the width bridge drops at the text's rate
        "text attention": (False, False, True),
    }


def test_initial_values(small):
    def start(model, image, ids, mask):
        return model.encode_image(image), model.match(model.encode_text(ids, mask))

    init = jax.jit(nn.init(start, MPlug(small)))
    params = nn.meta.unbox(init(quick_key(0), *inputs(small)))["params"]
    flat = flatten_dict(params, sep="/")
    assert flat.pop("temperature") == pytest.approx(0.07)
    # One pair in three is a match.
    np.testing.assert_allclose(np.exp(flat.pop("itm_head/bias")), [2 / 3, 1 / 3], rtol=1e-6)
    assert {name.split("/")[0] for name in flat} >= {"visual_encoder", "text_encoder", "bridge"}
    spread = {"visual_encoder": small.vision.width**-0.5}
    for name, value in flat.items():
        kind = name.rsplit("/", 1)[-1]
        if kind in ("bias", "scale"):
            np.testing.assert_array_equal(value, kind == "scale", err_msg=name)
        elif value.size > 100:
            want = spread.get(name.split("/")[0], small.text.init_std)
            assert np.std(value) == pytest.approx(want, rel=0.25), name
    # Layers of a stack start apart.
    query = flat["text_encoder/blocks/attention/query/kernel"]
    assert np.any(query[0] != query[1])


def linear(inputs_, outputs):
    return inputs_ * outputs + outputs


def attention_size(width):
    return 4 * linear(width, width)


def mlp_size(width, hidden):
    return linear(width, hidden) + linear(hidden, width)


@pytest.mark.parametrize(
    ("name", "side", "vit_millions", "connected"),
    [("base", 384, 86.5, 1), ("large", 336, 304.3, 0)],
)
# The large model's stride of 6 leaves no connected layer, as in the released weights.
@pytest.mark.filterwarnings("ignore:config.model.fusion")
def test_official_sizes_have_the_official_numbers_of_parameters(
    shapes_of, name, side, vit_millions, connected
):
    config = preset(name).replace(vision={"image_size": (side, side)})
    shapes = nn.meta.unbox(shapes_of(config))
    v, t = config.vision, config.text
    tokens = 1 + (side // v.patch_size[0]) ** 2
    d, norm = t.width, 2 * t.width
    text_layer = attention_size(d) + norm + mlp_size(d, t.mlp_dim) + norm
    cross_layer = text_layer + attention_size(d) + norm
    embeddings = (t.vocab_size + t.max_positions + t.type_vocab_size) * d + norm
    head = linear(d, d) + norm + t.vocab_size
    vit = (
        v.patch_size[0] ** 2 * 3 * v.width
        + (1 + tokens) * v.width
        + 2 * 2 * v.width
        + v.depth * (attention_size(v.width) + mlp_size(v.width, v.mlp_dim) + 4 * v.width)
    )
    expected = {
        "visual_encoder": vit,
        "text_encoder": embeddings + 6 * text_layer,
        "fusion": (6 - connected) * cross_layer + connected * text_layer,
        "decoder": embeddings + 12 * cross_layer + head,
        "mlm_head": head,
        "vision_proj": linear(d, 256),
        "text_proj": linear(d, 256),
        "itm_head": linear(d, 2),
        "temperature": 1,
    }
    if name == "large":
        expected["bridge"] = linear(v.width, d) + norm
    counts = {part: count_params(shapes[part]) for part in shapes}
    assert counts == expected
    # The published counts; theirs of the image encoder include CLIP's projection, unused here.
    projection = v.width * {"base": 512, "large": 768}[name]
    assert (counts["visual_encoder"] + projection) / 1e6 == pytest.approx(vit_millions, abs=0.06)
    assert counts["text_encoder"] / 1e6 == pytest.approx(66.4, abs=0.06)
    assert counts["decoder"] / 1e6 == pytest.approx(137.9, abs=0.06)


AXES = {*RULES, None}


@pytest.mark.parametrize(
    ("schedule", "norm", "stem"), [("co_attention", "pre", "conv"), ("official", "post", "patch")]
)
def test_every_parameter_names_known_axes(small, shapes_of, schedule, norm, stem):
    vision = dataclasses.asdict(VisionConfig(image_size=(8, 12), patch_size=(4, 4), stem=stem))
    vision |= {"width": 12, "heads": 3, "mlp_dim": 20, "depth": 2}
    config = small.replace(fusion={"schedule": schedule}, text={"norm": norm}, vision=vision)
    boxed = flatten_dict(shapes_of(config), sep="/")
    assert boxed.pop("temperature").shape == ()  # a scalar has no axis
    for name, leaf in boxed.items():
        assert isinstance(leaf, nn.LogicallyPartitioned), name
        assert len(leaf.names) == leaf.value.ndim and set(leaf.names) <= AXES, name
        named = [axis for axis in leaf.names if axis is not None]
        assert named and len(named) == len(set(named)), name
        assert ("/blocks/" in name) == (leaf.names[0] == "layers"), name


def test_texts_of_other_lengths_and_pictures_of_other_sizes_need_no_new_parameters(
    small, shapes_of
):
    params = nn.meta.unbox(shapes_of(small))
    apply = functools.partial(jax.eval_shape, MPlug(small).apply, {"params": params})
    for height, width, length in ((4, 6, 11), (12, 30, 1)):
        image = jax.ShapeDtypeStruct((2, height, width, 3), jnp.uint8)
        ids = jax.ShapeDtypeStruct((2, length), jnp.int32)
        out = apply(image, ids, jax.ShapeDtypeStruct((2, length), bool))
        assert out["fused_image"].shape == (2, 1 + height * width // 24, small.text.width)
        assert out["decoder_logits"].shape == (2, length, small.text.vocab_size)
