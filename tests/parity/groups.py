"""Groups of values by the kind of a case, and the two small kinds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from mplug_jax.models.vit import resize_positions
from mplug_jax.objectives.mlm import IGNORED_LABEL, mlm_loss
from mplug_jax.objectives.prefix_lm import prefix_lm_loss
from tests.parity.boxes import grounding
from tests.parity.captions import adamw, beams, caption, scst, video_caption
from tests.parity.cases import Case, ids_of
from tests.parity.common import Value, Values, gradients, mean
from tests.parity.contrast import retrieval
from tests.parity.towers import towers
from tests.parity.vqa import vqa, vqa_momentum


def mlm(case: Case) -> Values:
    """MLM and prefix LM on given embeddings, hard and with the official distillation."""
    text, image = (jnp.asarray(case.inputs[f"{n}_embeds"]) for n in ("text", "image"))
    ids, mask = ids_of(case.inputs["ids"]), jnp.asarray(case.inputs["mask"], bool)
    labels = ids_of(case.inputs["mlm_labels"])
    soft = jnp.log(jnp.asarray(case.inputs["soft_labels"]))
    valid, everywhere = jnp.ones(len(ids), bool), jnp.ones(image.shape[:2], bool)

    def loss(params: Any) -> tuple[Any, Any]:
        _, fused = case.apply(params, "fuse", image, text, mask)
        logits = case.apply(params, "mlm_logits", fused)
        decoded = case.apply(params, "decode", ids, image, everywhere, mask)

        def both(alpha: float) -> tuple[Any, Any]:
            given = labels, labels != IGNORED_LABEL, valid, soft, alpha, "sequence"
            prefix = prefix_lm_loss(
                decoded[:, :-1], ids, mask, valid, soft[:, :-1], alpha, "sequence"
            )
            return mean(mlm_loss(logits, *given)), mean(prefix)

        return both(0.0)[0], (logits, decoded, both(0.0), both(0.4))

    (_, (logits, decoded, hard, distilled)), values = gradients(case, loss, "grad/")
    return values | {
        "mlm_logits": Value(logits),
        "prefix_logits": Value(decoded),
        "mlm_loss": Value(hard[0]),
        "loss": Value(hard[0]),
        "prefix_loss": Value(hard[1]),
        "mlm_loss_alpha0.4": Value(distilled[0]),
        "prefix_loss_alpha0.4": Value(distilled[1]),
    }


def positions(case: Case) -> Values:
    """Position embeddings resampled from one square grid to another."""
    values = {}
    for name, table in case.inputs.items():
        old, new = (int(side) for side in name.removeprefix("pos_").split("_"))
        resized = resize_positions(jnp.asarray(table), (old, old), (new, new))
        values[name] = Value(resized)
    return values


GROUPS: dict[str, tuple[Callable[[Case], Values], ...]] = {
    "caption": (towers, caption, beams, scst, adamw),
    "vatex": (video_caption,),
    "vqa": (towers, vqa, beams, vqa_momentum),
    "grounding": (towers, grounding),
    "retrieval": (towers, retrieval),
    "mlm": (mlm,),
    "misc": (positions,),
}
