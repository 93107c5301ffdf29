"""Self-critical sequence training (Rennie et al. 2017) on CIDEr-D, with texts of a beam search.

Before each update the current parameters write several texts a picture, which are rewarded on the
host; the loss reads them again. The official captioning does both in one forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from mplug_jax.config import ConfigError
from mplug_jax.data.loading import picture_id
from mplug_jax.data.records import BadSample, Source, SourceError
from mplug_jax.data.sources.scene_language import captions as scene_captions
from mplug_jax.data.sources.scenes import Scenes
from mplug_jax.data.task_examples import prompt_ids
from mplug_jax.data.tokenizers import Tokenizer
from mplug_jax.evaluation.cider import Cider
from mplug_jax.evaluation.ptb import ptb_tokenize
from mplug_jax.generation.beam import BeamConfig, beam_search
from mplug_jax.generation.greedy import greedy
from mplug_jax.generation.sampling import SampleConfig, sample
from mplug_jax.generation.stepping import check_positions
from mplug_jax.objectives.scst import scst_loss
from mplug_jax.tasks.caption import examples
from mplug_jax.tasks.forward import Forward, answer_logits, picture_memory
from mplug_jax.tasks.kind import Kind, LossParts
from mplug_jax.tasks.setup import Setup
from mplug_jax.training.sharding import (
    BATCH,
    batch_parts,
    batch_sharding,
    jit_on,
    place_local_batch,
)
from mplug_jax.training.signals import between_batches

Array = jax.Array
# Values of config.finetune.scst, which mplug_jax.validation checks.
SEARCHES = ("beam", "sample")
BASELINES = ("mean", "greedy")


def references(sources: Sequence[tuple[Source, float]]) -> dict[int, list[str]]:
    """PTB tokens of all captions by the id that batches give a picture.

    Records that cannot be used are left out.

    Raises:
      SourceError: no caption at all.
    """
    found: dict[int, list[str]] = {}
    for number, (source, _) in enumerate(sources):
        for image_id, captions in _captions(source):
            picture = picture_id(image_id, number, len(sources))
            found.setdefault(picture, []).extend(map(ptb_tokenize, captions))
    if not found:
        raise SourceError(
            "config.data.train holds no captions, which config.task='scst' needs as references: "
            "choose a source of captions (of scenes, fields=('captions',))."
        )
    return found


def _captions(source: Source) -> Iterator[tuple[int, list[str]]]:
    """image_id and captions of every record that has some."""
    if isinstance(source, Scenes) and "captions" in source.fields and not source.video:
        # What is said of a scene follows from its layout: nothing has to be drawn.
        yield from ((i, scene_captions(source.layout(i))) for i in range(len(source)))
        return
    for index in range(len(source)):
        try:
            record = source[index]
        except BadSample:
            continue  # training reports it when it comes to this record
        if record.get("captions"):
            yield int(record["image_id"]), record["captions"]


class Rewards:
    """CIDEr-D of texts against all training captions of their pictures.

    Document frequencies are those of the training captions.

    Args:
      references: token strings by image_id, as ``references`` makes them.
      tokenizer: of the texts.
    """

    def __init__(self, references: Mapping[Hashable, Sequence[str]], tokenizer: Tokenizer):
        self._cider, self._decode = Cider(references), tokenizer.decode

    def __call__(self, ids: np.ndarray, image_ids: np.ndarray) -> np.ndarray:
        """``[B, K]`` float32 of texts ``[B, K, T]``, each up to its first [SEP]."""
        texts = [ptb_tokenize(self._decode(row)) for row in ids.reshape(-1, ids.shape[-1])]
        owners = np.repeat(image_ids, ids.shape[1]).tolist()
        return self._cider.score(texts, owners).reshape(ids.shape[:2]).astype(np.float32)


class Rollout:
    """Adds to a batch the texts that the current parameters write, and their rewards.

    The batch is cut into ``config.finetune.scst.chunks``: while the devices search for the texts
    of one, the texts of the one before are rewarded on the host. All processes run one search over
    the global mesh, each with as many of its own rows, and each rewards its own rows alone.

    A text of 'beam' follows from picture and parameters; one of 'sample' also from the run's seed,
    the step and the row in the global batch: never from chunks, devices or processes.

    Raises:
      ConfigError, SourceError: settings that cannot work; captions that are missing.
      ValueError: lengths that do not fit each other or the model.
    """

    def __init__(self, setup: Setup, mesh: Any):
        self._settings, self._mesh = setup.config.finetune.scst, mesh
        self._prompt = prompt_ids(setup.tokenizer, setup.config.finetune.caption.prompt)
        _check(setup, mesh)
        longest = len(self._prompt) + self._settings.max_length - 1
        check_positions(setup.model, longest)
        self._rewards = Rewards(references(setup.sources), setup.tokenizer)
        self._search = jit_on(mesh, _search(setup), batch_sharding(mesh))

    def shapes(self, example: Mapping[str, Any]) -> dict[str, Any]:
        """The example with zeros for text_ids, text_mask ``[K, T]``, [CLS], the prompt and the
        text, padded; rewards ``[K]``; and with the baseline 'greedy' greedy_reward ``[]``."""
        texts = self._settings.texts
        length = len(self._prompt) + self._settings.max_length
        added = {
            "text_ids": np.zeros((texts, length), np.int32),
            "text_mask": np.zeros((texts, length), bool),
            "rewards": np.zeros(texts, np.float32),
        }
        if self._settings.baseline == "greedy":
            added["greedy_reward"] = np.float32(0.0)
        return {**example, **added}

    def __call__(
        self, params: Any, batch: Mapping[str, np.ndarray], step: int
    ) -> dict[str, np.ndarray]:
        """The rows of this process ``batch`` with what ``shapes`` names."""
        chunks, rows = self._settings.chunks, len(batch["image"]) // self._settings.chunks
        place = jax.process_index() * len(batch["image"]) + np.arange(len(batch["image"]))
        # Another thread rewards: where a search on the device keeps its caller waiting (a loop on
        # a GPU asks the host whether to go on), it leaves the interpreter to others.
        with ThreadPoolExecutor(1) as rewarding:
            pending = []
            for start in range(0, chunks * rows, rows):
                between_batches()
                chunk = slice(start, start + rows)
                inputs = {"image": batch["image"][chunk], "row": place[chunk].astype(np.int32)}
                found = self._search(params, place_local_batch(inputs, self._mesh), np.int32(step))
                pending.append(rewarding.submit(self._rewarded, found, batch["image_id"][chunk]))
            parts = [future.result() for future in pending]
        return {**batch, **jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)}

    def _rewarded(self, found: dict[str, Array], image_ids: np.ndarray) -> dict[str, np.ndarray]:
        local = multihost_utils.global_array_to_host_local_array(found, self._mesh, BATCH)
        local = jax.device_get(local)
        ids, lengths = local["ids"], local["lengths"]
        prompt = np.broadcast_to(self._prompt, (*ids.shape[:2], len(self._prompt)))
        mask = np.arange(ids.shape[-1]) < lengths[..., None]
        added = {
            "text_ids": np.concatenate([prompt, ids], axis=-1),
            "text_mask": np.concatenate([np.ones(prompt.shape, bool), mask], axis=-1),
            "rewards": self._rewards(ids, image_ids),
        }
        if "greedy" in local:
            added["greedy_reward"] = self._rewards(local["greedy"][:, None], image_ids)[:, 0]
        return added


def _check(setup: Setup, mesh: Any) -> None:
    """Raises ConfigError for a setting of ``config.finetune.scst`` that cannot work."""
    settings, name = setup.config.finetune.scst, "config.finetune.scst"
    if settings.texts < 2 and settings.baseline == "mean":
        raise ConfigError(
            f"{name}.texts={settings.texts} teaches nothing with the baseline 'mean', which is "
            "then the text's own reward: take 2 texts or more, or baseline='greedy'."
        )
    parts = settings.chunks * batch_parts(mesh)
    if settings.chunks < 1 or setup.config.batch_size % parts:
        raise ConfigError(
            f"{name}.chunks={settings.chunks} does not cut config.batch_size="
            f"{setup.config.batch_size} into parts for {batch_parts(mesh)} devices: the batch "
            "must be a multiple of chunks times devices."
        )


def _search(setup: Setup) -> Callable[[Any, Mapping[str, Array], Array], dict[str, Array]]:
    """``(params, {image, row}, step) -> ids [B, K, T], lengths [B, K] and greedy [B, T]`` where
    that is the baseline; texts come without the prompt.

    Raises:
      ValueError: settings that the search refuses.
    """
    settings, tokenizer = setup.config.finetune.scst, setup.tokenizer
    prompt = prompt_ids(tokenizer, setup.config.finetune.caption.prompt)
    special = {
        "cls_id": tokenizer.cls_id,
        "sep_id": tokenizer.sep_id,
        "pad_id": tokenizer.pad_id,
        "prompt_ids": prompt,
    }
    lengths = {"max_length": settings.max_length, "min_length": settings.min_length}
    beam = BeamConfig(
        settings.texts,
        **lengths,
        length_penalty=settings.length_penalty,
        procedure=settings.procedure,
    )
    # The gradient of the expected reward asks for texts of the model's own distribution, uncut.
    drawn = SampleConfig(settings.texts, **lengths, top_p=1.0)

    def search(params: Any, batch: Mapping[str, Array], step: Array) -> dict[str, Array]:
        memory = _memory(setup, Forward(setup.model, params), batch["image"])
        if settings.search == "beam":
            texts = beam_search(setup.model, params, *memory, beam, **special)
        else:
            rng = jax.random.fold_in(jax.random.key(setup.config.seed), step)
            texts = sample(
                setup.model, params, *memory, drawn, rng, **special, row_ids=batch["row"]
            )
        found = {"ids": texts.ids, "lengths": texts.lengths}
        if settings.baseline == "greedy":
            found["greedy"] = greedy(setup.model, params, *memory, **special, **lengths)
        return found

    return search


def _memory(setup: Setup, forward: Forward, image: Array) -> tuple[Array, Array]:
    tokenizer, kind = setup.tokenizer, setup.config.finetune.caption.memory
    return picture_memory(forward, image, kind, tokenizer.cls_id, tokenizer.sep_id)


def loss(setup: Setup, forward: Forward, teacher: Any, batch: Any, step: Any) -> LossParts:
    """The self-critical loss of the rollout's texts; their mean ``reward`` and ``length`` (tokens,
    [SEP] included) are logged."""
    ids, mask = batch["text_ids"], batch["text_mask"]
    logits = answer_logits(forward, _memory(setup, forward, batch["image"]), ids)
    prompt = len(prompt_ids(setup.tokenizer, setup.config.finetune.caption.prompt))
    loss_sum, count = scst_loss(
        logits,
        ids,
        mask,
        batch["rewards"],
        batch["valid"],
        length_penalty=setup.config.finetune.scst.length_penalty,
        prompt_length=prompt,
        greedy_rewards=batch.get("greedy_reward"),
    )
    lengths = jnp.sum(mask[..., prompt:], axis=-1)
    written = (lengths > 0) & batch["valid"][:, None]
    metrics = {
        name: jnp.sum(jnp.where(written, values, 0.0)) / jnp.maximum(count, 1.0)
        for name, values in (("reward", batch["rewards"]), ("length", lengths))
    }
    return loss_sum, count, metrics


SCST = Kind(examples, loss, rollout=Rollout)
