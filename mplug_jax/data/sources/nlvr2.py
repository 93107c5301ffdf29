"""NLVR2: is a sentence true of two pictures? https://github.com/lil-lab/nlvr"""

import os
from collections.abc import Mapping
from typing import Any

from mplug_jax.data.records import Pair
from mplug_jax.data.sources.drafts import BadItem, Draft, brief, choice, list_of, text_of

TRUTH = {"True": True, "False": False, "true": True, "false": False}


def read_published(item: Mapping[str, Any]) -> Draft:
    """The published rows: `{identifier: "dev-850-0-0", sentence, label, directory?}`.

    An identifier is split, number of the set, pair, sentence; the pictures of a pair are
    `dev-850-0-img0.png` (left) and `-img1.png`. Those of training lie in numbered folders, whose
    number is `directory`.
    """
    identifier = text_of(item.get("identifier"), "identifier")
    pair, _, sentence_number = identifier.rpartition("-")
    if pair.count("-") != 2 or not sentence_number:
        raise BadItem(f"identifier is {brief(identifier)}, not of the form 'dev-850-0-0'")
    folder = item.get("directory")
    folder = "" if folder is None else str(folder)
    left, right = (os.path.join(folder, f"{pair}-img{side}.png") for side in (0, 1))
    return Draft(left, name=identifier, pair=_pair(right, item))


def read_plain(item: Mapping[str, Any]) -> Draft:
    """Rows that name their pictures: `{images: [left, right], sentence, label}`."""
    images = list_of(item["images"], "images")
    if len(images) != 2:
        raise BadItem(f"images has {len(images)} pictures, not 2")
    left, right = (text_of(image, "a picture of images") for image in images)
    return Draft(left, pair=_pair(right, item))


def _pair(right: str, item: Mapping[str, Any]) -> Pair:
    label = item.get("label")
    if not isinstance(label, bool):
        label = TRUTH[choice(label, TRUTH, "label")]
    return Pair(image2=right, sentence=text_of(item.get("sentence"), "sentence"), label=label)
