"""Activations of the ViT, the text encoder and the fusion network."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from tests.parity.cases import Case
from tests.parity.common import Value, Values


def towers(case: Case) -> Values:
    """Every layer of the ViT, the text encoder and the fusion network."""
    ids, mask = case.text("question" if case.kind == "vqa" else "text")

    def forward(model: Any) -> Any:
        image = model.encode_image(case.image)
        text = model.encode_text(ids, mask)
        return image, text, model.fuse(image, text, mask)

    run = jax.jit(nn.apply(forward, case.model, mutable=["intermediates"]))
    (image, text, (fused_image, fused_text)), state = run({"params": case.params})
    seen = state["intermediates"]
    vit, bert = seen["visual_encoder"], seen["text_encoder"]
    values = {
        "visual/ln_pre": vit["embedded"][0],
        "image_embeds": image,
        "text/embeddings": bert["embedded"][0],
        "text_embeds": text,
        "fusion_image": fused_image,
        "fusion_text": fused_text,
        "visual/ln_post_out": _ln_post_out(case),
    }
    values |= {f"visual/block{i}": x for i, x in enumerate(vit["blocks"]["output"][0])}
    values |= {f"text/layer{i}": x for i, x in enumerate(bert["blocks"]["output"][0])}
    # The released fusion network holds dead layers first; the last ones run.
    dead = case.settings["bert"]["num_hidden_layers"] - case.config.fusion.depth
    for i in range(case.config.fusion.depth):
        values[f"fusion/layer{dead + i}"] = seen["fusion"][f"layer_{i}"]["output"][0]
    return {name: Value(value) for name, value in values.items()}


def _ln_post_out(case: Case) -> Any:
    return jax.jit(lambda p: case.apply(p, lambda m: m.visual_encoder(case.image)))(case.params)
