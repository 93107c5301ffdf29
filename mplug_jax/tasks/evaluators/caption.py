"""Captions of pictures and clips, compared with references and, for scenes, with the truth."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mplug_jax.data.sources.scenes import Scenes
from mplug_jax.data.task_examples import PictureExamples, prompt_ids
from mplug_jax.evaluation.captions import caption_metrics
from mplug_jax.evaluation.scene_captions import attribute_accuracy
from mplug_jax.generation.beam import BeamConfig
from mplug_jax.tasks.evaluators.held_out import HeldOut, Sheet, best_texts, write_json
from mplug_jax.tasks.forward import picture_memory

logger = logging.getLogger(__name__)


class CaptionEvaluator:
    """The COCO caption metrics, and for still scenes how much of the captions is true.

    Args:
      limit: pictures captioned; 0 takes all.
      max_length, min_length: tokens of a caption after its prompt.
      beams, procedure: of the search; a single beam is greedy.
      memory: what the decoder reads, 'image' or 'fused'.
      prompt: words that every caption continues; they are no part of it.

    Raises:
      ValueError: the prompt and a caption do not fit the model's positions.
    """

    def __init__(
        self,
        data: HeldOut,
        *,
        limit: int,
        max_length: int,
        min_length: int,
        beams: int,
        procedure: str,
        memory: str,
        prompt: str,
    ):
        self._data, self._limit = data, limit
        self._examples = PictureExamples(data.transform, data.setup.model_config.frames)
        search = BeamConfig(beams, max_length, min_length, procedure=procedure, returned=1)
        start = prompt_ids(data.setup.tokenizer, prompt)
        positions = data.setup.model_config.text.max_positions
        if len(start) + max_length - 1 > positions:
            raise ValueError(
                f"a caption evaluator's prompt {prompt!r} of {len(start)} tokens and max_length="
                f"{max_length} exceed the {positions} positions of config.model.text.max_positions."
            )
        special = data.special

        def write(params: Any, batch: Any) -> jax.Array:
            ids = special["cls_id"], special["sep_id"]
            seen = picture_memory(data.forward(params), batch["image"], memory, *ids)
            return best_texts(data, params, seen, search, start)

        self._write = data.compiled(write)

    def __call__(self, params: Any, samples: Path | None = None) -> dict[str, float]:
        """``cider`` and its like in percent where there are references, ``words`` of a caption; for
        still scenes fractions ``attribute_accuracy`` ... too. With ``samples``, which the last
        evaluation of a run has, ``meteor`` and ``spice`` of photographs too where Java is there.
        """
        data, captions, sheet = self._data, {}, Sheet()
        rows = data.each(self._write, params, self._examples, ("image",), limit=self._limit)
        for index, example, ids in rows:
            captions[index] = data.setup.tokenizer.decode(ids)
            if samples is not None and sheet.wants(example):
                sheet.add(example, captions[index], self._right(index, captions[index]))
        known = {index: Known.of(data.source[index]) for index in captions}
        if samples is not None:
            lines = [_line(known[index], caption) for index, caption in captions.items()]
            write_json(samples / "captions.json", lines)
            sheet.write(samples / "captions.png")
        return self._metrics(captions, known, java=samples is not None)

    def _drawn(self) -> Scenes | None:
        """The source, if it knows what its still pictures show."""
        source = self._data.source
        return source if isinstance(source, Scenes) and not source.video else None

    def _right(self, index: int, caption: str) -> bool | None:
        scenes = self._drawn()
        if scenes is None:
            return None
        return bool(attribute_accuracy([scenes.layout(index)], [caption])["attribute_accuracy"])

    def _metrics(
        self, captions: dict[int, str], known: Mapping[int, Known], java: bool
    ) -> dict[str, float]:
        source, scenes = self._data.source, self._drawn()
        metrics = {"words": float(np.mean([len(said.split()) for said in captions.values()]))}
        if scenes is not None:
            layouts = [scenes.layout(index) for index in captions]
            metrics |= attribute_accuracy(layouts, list(captions.values()))
        if not any(record.captions for record in known.values()):
            logger.warning(
                "%r holds no captions to compare with: there is no metric of them", source
            )
            return metrics
        # Drawn scenes have a grammar of their own: METEOR's synonyms and SPICE's parser say
        # nothing of them and take longer than all the rest.
        return metrics | compared(captions, known, java=java and not isinstance(source, Scenes))


class Known(NamedTuple):
    """What a record tells besides its picture.

    Attributes:
      image_id: a running number where the data set has no ids of its own; name: of the picture.
      captions: references, if any; domain: of NoCaps, such as 'near-domain', else ''.
    """

    image_id: int
    name: str
    captions: Sequence[str]
    domain: str

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Known:
        """What is told by a record of a source."""
        captions, domain = record.get("captions") or (), record.get("domain") or ""
        return cls(record["image_id"], record["id"], captions, domain)


def _line(known: Known, caption: str) -> dict[str, Any]:
    """A row as COCO's caption evaluation reads it, and what the picture is called."""
    return {"image_id": known.image_id, "caption": caption, "picture": known.name}


def compared(
    captions: Mapping[int, str], known: Mapping[int, Known], *, java: bool
) -> dict[str, float]:
    """The metrics of the captions of those that have references, and CIDEr within each domain, such
    as ``cider_near-domain``."""
    references = {i: list(record.captions) for i, record in known.items() if record.captions}
    groups: dict[str, list[int]] = {}
    for i in references:
        if domain := known[i].domain:
            groups.setdefault(domain, []).append(i)
    metrics = caption_metrics({i: captions[i] for i in references}, references, java=java)
    for domain, group in sorted(groups.items()):
        said, gold = ({i: texts[i] for i in group} for texts in (captions, references))
        metrics[f"cider_{domain}"] = caption_metrics(said, gold, java=False)["cider"]
    return metrics
