"""The COCO caption suite: BLEU, ROUGE-L, CIDEr, and with Java METEOR and SPICE.

The metrics are pycocoevalcap's own; what is ours is the tokeniser, so that all but METEOR and SPICE
need no Java and come out the same everywhere, and the checks.
"""

import logging
import shutil
import subprocess
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pycocoevalcap.spice.spice
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.spice.spice import Spice

from mplug_jax.evaluation.ids import common_ids
from mplug_jax.evaluation.ptb import ptb_tokenize

logger = logging.getLogger(__name__)

# SPICE's parser comes as a download of some 400 MB, which an evaluation must not start unasked.
_SPICE_MODELS = (
    Path(pycocoevalcap.spice.spice.__file__).parent / "lib" / "stanford-corenlp-3.6.0-models.jar"
)
_FETCH_MODELS = (
    "python -c 'from pycocoevalcap.spice.get_stanford_models import get_stanford_models as get; "
    "get()'"
)


def caption_metrics(
    hypotheses: Mapping[Hashable, str],
    references: Mapping[Hashable, Sequence[str]],
    *,
    java: bool = True,
) -> dict[str, float]:
    """Scores one caption a picture against all references of the picture.

    Args:
      hypotheses: the caption of each picture, by id; raw text, tokenised here.
      references: at least one reference of each picture, by the same ids; raw text.
      java: whether to compute METEOR and SPICE, which run Java programs. Where they cannot run, a
        warning says so and they are left out.

    Returns:
      bleu_1 .. bleu_4, rouge_l, cider (which is CIDEr-D, see `mplug_jax.evaluation.cider`), and
      where they could be had meteor and spice. All as printed in papers, 100 times pycocoevalcap's
      figures: a CIDEr of 1.41 there is 141.0 here.

    Raises:
      ValueError: a hypothesis without references or the other way round, a picture with an empty
        list of references, or references without a single word; names the id.
    """
    ids = common_ids(hypotheses, references, "caption")
    bare = [key for key in ids if not references[key]]
    if bare:
        raise ValueError(f"{len(bare)} pictures have no reference, the first is {bare[0]!r}")
    # METEOR's and SPICE's protocols want plain keys, and every metric the same order.
    truth = {
        number: [ptb_tokenize(caption) for caption in references[key]]
        for number, key in enumerate(ids)
    }
    guess = {number: [ptb_tokenize(hypotheses[key])] for number, key in enumerate(ids)}
    if not any(any(captions) for captions in truth.values()):
        raise ValueError(f"no reference has a word; picture {ids[0]!r} has {references[ids[0]]!r}")
    bleu, _ = Bleu(4).compute_score(truth, guess, verbose=0)
    metrics = {f"bleu_{n}": value for n, value in enumerate(bleu, start=1)}
    metrics["rouge_l"], _ = Rouge().compute_score(truth, guess)
    metrics["cider"], _ = Cider().compute_score(truth, guess)
    if java:
        metrics |= _java_metrics(truth, guess)
    return {name: 100.0 * float(value) for name, value in metrics.items()}


def _java_metrics(truth: dict[int, list[str]], guess: dict[int, list[str]]) -> dict[str, float]:
    """METEOR and SPICE, or those of them that run here."""
    if shutil.which("java") is None:
        logger.warning("METEOR and SPICE are left out: they need Java, and there is no `java` here")
        return {}
    metrics = {}
    scorers: dict[str, Any] = {"meteor": Meteor}
    if _SPICE_MODELS.exists():
        scorers["spice"] = Spice
    else:
        logger.warning("SPICE is left out: fetch its models (400 MB) with %s", _FETCH_MODELS)
    for name, scorer in scorers.items():
        try:
            metrics[name], _ = scorer().compute_score(truth, guess)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            logger.warning("%s is left out: its Java program failed: %s", name.upper(), error)
    return metrics
