"""Accuracy of classes: NLVR2 and visual entailment."""

from collections.abc import Hashable, Mapping

from mplug_jax.evaluation.ids import common_ids


def classification_accuracy(
    predictions: Mapping[Hashable, int | str], labels: Mapping[Hashable, int | str]
) -> dict[str, float]:
    """Percentage of examples whose predicted class is the true one: `accuracy`.

    Args:
      predictions: the predicted class of each example, by id.
      labels: the true class of each example, by the same ids.

    Raises:
      ValueError: a prediction without an example or the other way round, or classes of different
        types (a number never equals its name, and the accuracy would silently be 0).
    """
    ids = common_ids(predictions, labels, "prediction")
    for key in ids:
        if isinstance(predictions[key], str) != isinstance(labels[key], str):
            raise ValueError(
                f"the prediction of {key!r} is {predictions[key]!r}, its label {labels[key]!r}: "
                "give both as numbers or both as names"
            )
    right = sum(bool(predictions[key] == labels[key]) for key in ids)
    return {"accuracy": 100.0 * right / len(ids)}
