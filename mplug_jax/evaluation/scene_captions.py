"""How much of what captions say about drawn scenes is true: the scene is known, so words can be
checked one kind at a time, where n-gram metrics would only compare wordings."""

from collections.abc import Sequence

from mplug_jax.data.sources.scene_language import check_caption
from mplug_jax.data.sources.scene_layout import Layout

# What `check_caption` judges beside `attributes`; the last three only where a caption claims it.
_JUDGED = ("colour", "shape", "count", "size", "place", "relation")


def attribute_accuracy(layouts: Sequence[Layout], captions: Sequence[str]) -> dict[str, float]:
    """Fractions of captions that are right about their scenes.

    Args:
      layouts: the scenes.
      captions: one generated caption for each.

    Returns:
      attribute_accuracy: of all captions, those with every pair of colour and shape right and
        none left out; colour_accuracy, shape_accuracy and count_accuracy likewise, each alone. A
        caption that names nothing is wrong.
      size_accuracy, place_accuracy, relation_accuracy: of the captions that claim such a thing,
        those that are right about it. Missing where no caption claims it.
      relation_claims: of all captions, those that claim a relation, without which the accuracy of
        relations says little.

    Raises:
      ValueError: no caption, or not as many captions as layouts.
    """
    if len(layouts) != len(captions) or not captions:
        raise ValueError(
            f"{len(layouts)} layouts and {len(captions)} captions have to be as many and at least 1"
        )
    checks = [
        check_caption(layout, caption) for layout, caption in zip(layouts, captions, strict=True)
    ]
    metrics = {"attribute_accuracy": _fraction([check["attributes"] for check in checks])}
    for key in _JUDGED:
        verdicts = [check[key] for check in checks if key in check]
        if verdicts:
            metrics[f"{key}_accuracy"] = _fraction(verdicts)
    metrics["relation_claims"] = _fraction(["relation" in check for check in checks])
    return metrics


def _fraction(verdicts: Sequence[bool]) -> float:
    return sum(verdicts) / len(verdicts)
