"""How fast is the CIDEr-D of training rewards, against pycocoevalcap's on the same captions?

    python benchmarks/cider.py --captions=val.json [--batch=160] [--repeats=3]

`--captions` is a JSON list of `{"caption": [several of one photo]}`, as the Flickr8k files are.
The first caption of each photo is scored against the others. "whole set" starts from the texts each
time, references included; "batches" scores the set in batches, as self-critical training does: ours
by a scorer built once, pycocoevalcap's by a new one each batch, since it knows no other way (its
document frequencies, and so its scores, are then those of the batch). Best of the repeats.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags
from pycocoevalcap.cider.cider import Cider as ReferenceCider

from mplug_jax.evaluation.cider import Cider
from mplug_jax.evaluation.ptb import ptb_tokenize

_CAPTIONS = flags.DEFINE_string("captions", None, "JSON file of captions.", required=True)
_BATCH = flags.DEFINE_integer("batch", 160, "Captions of a batch: 32 photos of 5 beams.")
_REPEATS = flags.DEFINE_integer("repeats", 3, "Measurements, of which the best counts.")


def main(_: list[str]) -> None:
    """Measures, compares and prints one table."""
    photos = [record["caption"] for record in json.loads(Path(_CAPTIONS.value).read_text())]
    photos = [captions for captions in photos if len(captions) > 1]
    count = len(photos)
    tokenizing, tokens = _timed(lambda: [[ptb_tokenize(text) for text in each] for each in photos])
    hypotheses = [captions[0] for captions in tokens]
    references = {number: captions[1:] for number, captions in enumerate(tokens)}
    blocks = [
        range(start, min(start + _BATCH.value, count)) for start in range(0, count, _BATCH.value)
    ]

    def reference(numbers: range) -> np.ndarray:
        truth = {number: references[number] for number in numbers}
        return ReferenceCider().compute_score(truth, {n: [hypotheses[n]] for n in numbers})[1]

    def ours(scorer: Cider, numbers: range) -> np.ndarray:
        return scorer.score(hypotheses[numbers.start : numbers.stop], numbers)

    building, scorer = _timed(lambda: Cider(references))
    rows = {
        "whole set, pycocoevalcap": _timed(lambda: reference(range(count))),
        "whole set, ours": _timed(lambda: ours(Cider(references), range(count))),
        "batches, pycocoevalcap": _timed(lambda: [reference(block) for block in blocks]),
        "batches, ours": _timed(lambda: [ours(scorer, block) for block in blocks]),
    }
    captions = sum(len(each) for each in photos)
    print(f"{count} photos, {captions} captions, batches of {_BATCH.value}, {os.cpu_count()} cores")
    print(
        f"tokenised {captions / tokenizing:,.0f} captions/s; our scorer built in {building:.2f} s"
    )
    print(f"{'':<28}{'seconds':>10}{'captions/s':>14}")
    for name, (seconds, _) in rows.items():
        print(f"{name:<28}{seconds:>10.3f}{count / seconds:>14,.0f}")
    expected = rows["whole set, pycocoevalcap"][1]
    for name in ("whole set, ours", "batches, ours"):
        scores = np.concatenate([np.atleast_1d(block) for block in rows[name][1]])
        print(f"largest difference, {name}: {np.abs(scores - expected).max():.1e}")


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    best = float("inf")
    for _ in range(_REPEATS.value):
        began = time.perf_counter()
        result = call()
        best = min(best, time.perf_counter() - began)
    return best, result


if __name__ == "__main__":
    app.run(main)
