"""What the decoder writes about a picture: captions and answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mplug_jax.data.task_examples import prompt_ids
from mplug_jax.data.transforms import ImageTransform
from mplug_jax.generation.beam import BeamConfig, beam_search
from mplug_jax.generation.ranking import rank_answers
from mplug_jax.generation.sampling import SampleConfig, sample
from mplug_jax.prediction.model import Model, PredictionError, one
from mplug_jax.tasks.forward import picture_memory, text_memory
from mplug_jax.tasks.vqa import question_examples

# Answers of a list that are scored whole, as in the official VQA.
RANKED = 128


def captioner(
    model: Model,
    *,
    memory: str | None = None,
    prompt: str | None = None,
    beams: int = 5,
    samples: int = 0,
    max_length: int | None = None,
    seed: int = 0,
) -> Callable[[np.ndarray], list[str]]:
    """A function from pixels ``[h, w, 3]`` to captions: the best one, or ``samples`` drawn.

    Args:
      memory: 'image' or 'fused', and prompt: as in ``config.finetune.caption``; None: as the model
        was trained.
      samples: texts of nucleus sampling (top_p 0.9); the same seed draws the same texts.
      max_length: tokens after the prompt, [SEP] included; None: as in training.

    Raises:
      PredictionError: prompt and text do not fit the model's positions.
    """
    setup = model.setup
    trained = setup.config.finetune.caption
    pretrained = setup.config.task == "pretrain"
    # Prefix LM, without a prefix.
    kind = memory or ("fused" if pretrained else trained.memory)
    start = prompt_ids(setup.tokenizer, trained.prompt if prompt is None else prompt)
    length = max_length or setup.config.data.target_length
    model.check_room(len(start), length)
    options = {**model.special, "prompt_ids": jnp.asarray(start)}
    drawing = SampleConfig(samples, length) if samples else None
    search = BeamConfig(beams, length, returned=1)

    @jax.jit
    def write(params: Any, image: jax.Array, key: jax.Array) -> jax.Array:
        t = setup.tokenizer
        seen = picture_memory(model.forward(params), image, kind, t.cls_id, t.sep_id)
        if drawing is not None:
            return sample(setup.model, params, *seen, drawing, key, **options).ids[0]
        return beam_search(setup.model, params, *seen, search, **options).ids[0]

    def caption(pixels: np.ndarray) -> list[str]:
        ids = write(model.params, one(model.picture(pixels)), jax.random.key(seed))
        return [setup.tokenizer.decode(row) for row in np.asarray(ids)]

    return caption


def answerer(
    model: Model, *, beams: int = 5, max_length: int | None = None
) -> Callable[[np.ndarray, str], str]:
    """A function from pixels and a question to an answer in the model's own words."""
    setup = model.setup
    length = max_length or setup.config.data.target_length
    model.check_room(1, length)
    search = BeamConfig(beams, length, returned=1)

    @jax.jit
    def write(params: Any, asked: Any) -> jax.Array:
        memory = text_memory(model.forward(params), *asked)
        return beam_search(setup.model, params, *memory, search, **model.special).ids[0, 0]

    def answer(pixels: np.ndarray, question: str) -> str:
        return setup.tokenizer.decode(
            np.asarray(write(model.params, _asked(model, pixels, question)))
        )

    return answer


def answer_ranker(
    model: Model, answers: list[str]
) -> Callable[[np.ndarray, str], list[tuple[str, float]]]:
    """A function from pixels and a question to the answers of a list, likeliest first, each with
    its probability among those that are scored whole (at most ``RANKED``)."""
    setup = model.setup
    encoded = [setup.tokenizer.encode(text, setup.config.data.target_length) for text in answers]
    ids, mask = (jnp.stack(part) for part in zip(*encoded, strict=True))
    count = min(RANKED, len(answers))

    @jax.jit
    def rank(params: Any, asked: Any) -> tuple[jax.Array, jax.Array]:
        memory = text_memory(model.forward(params), *asked)
        return rank_answers(setup.model, params, *memory, ids, mask, k=count)

    def ranking(pixels: np.ndarray, question: str) -> list[tuple[str, float]]:
        chosen, probabilities = rank(model.params, _asked(model, pixels, question))
        pairs = zip(np.asarray(chosen[0]), np.asarray(probabilities[0]), strict=True)
        return [(answers[place], float(probability)) for place, probability in pairs]

    return ranking


def read_answers(path: str) -> list[str]:
    """The answers of a JSON list, each once.

    Raises:
      PredictionError: there is none.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PredictionError(f"--answers={path} cannot be read: {error}.") from error
    texts = found if isinstance(found, list) else []
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise PredictionError(
            f'--answers={path} is no JSON list of answers, such as ["yes", "no"].'
        )
    return list(dict.fromkeys(text.strip() for text in texts))


def _asked(model: Model, pixels: np.ndarray, question: str) -> tuple[jax.Array, ...]:
    """Picture, ids and mask of a question, as the task's own examples make them."""
    transform = ImageTransform(model.setup.image_size, train=False)
    record = {"id": "question", "image": pixels, "image_id": 0}
    example = question_examples(model.setup, transform)(
        {**record, "questions": [{"question": question}]}
    )
    return tuple(one(example[name]) for name in ("image", "text_ids", "text_mask"))
