"""Pre-training: ITC, ITM, MLM and prefix LM on image-text pairs (facts section 2)."""

from __future__ import annotations

import copy
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mplug_jax.data.examples import PretrainExamples
from mplug_jax.models.config import ModelConfig
from mplug_jax.models.fusion import take_rows
from mplug_jax.models.mplug import init_params
from mplug_jax.models.stacking import join_parts, split_parts
from mplug_jax.objectives.itc import ITCOutput, enqueue, init_queue, itc_loss
from mplug_jax.objectives.itm import itm_labels, itm_loss, itm_mask, sample_negatives
from mplug_jax.objectives.mlm import mask_tokens, mlm_loss
from mplug_jax.objectives.momentum import alpha_ramp
from mplug_jax.objectives.prefix_lm import prefix_lm_loss
from mplug_jax.tasks.evaluators import build_evaluators
from mplug_jax.tasks.setup import prepare

Array = jax.Array


class Encoded(NamedTuple):
    """One model's embeddings of a batch; text rows are stacked as in ``Texts``."""

    image: Array
    texts: Array
    image_feats: Array
    text_feats: Array


class Texts(NamedTuple):
    """Text rows, and what MLM and prefix LM predict of them.

    They are stacked by pools of ITM's negatives, and in a pool by use: [text; masked; prefix].
    """

    ids: Array
    mask: Array
    labels: Array
    label_mask: Array
    targets: Array
    target_mask: Array


class Pretrain:
    """The four objectives with momentum distillation, their data and their evaluators."""

    optional_parameters = ("^classifier/",)

    def __init__(self, config: ConfigDict, workdir: str):
        self.config, self.setup = config, prepare(config, workdir)
        data = config.data
        self.make_example = PretrainExamples(
            self.setup.tokenizer,
            self.setup.transform,
            data.text_length,
            data.target_length,
            config.objectives.prefix.empty_rate,
            self.setup.model_config.frames,
        )
        self.uses_momentum = config.objectives.momentum > 0

    @property
    def sources(self) -> Any:
        """(training source, weight) pairs."""
        return self.setup.sources

    @property
    def model_config(self) -> ModelConfig:
        """The model's shapes."""
        return self.setup.model_config

    def without_remat(self) -> Pretrain:
        """The same task on a model that keeps its activations, for counting FLOPs."""
        task = copy.copy(self)
        task.setup = self.setup.without_remat()
        return task

    def init_params(self, rng: Array) -> Any:
        """Fresh parameters, boxed with their logical axes."""
        return init_params(self.model_config, rng)

    def rollout(self, mesh: Any) -> None:
        """Nothing is added to a batch."""
        return None

    def init_extra(self, rng: Array) -> Any:
        """The ITC queue, or None."""
        itc = self.config.objectives.itc
        if not (itc.weight and itc.queue_size):
            return None
        return init_queue(rng, itc.queue_size, self.model_config.embed_dim)

    def loss(
        self, params: Any, momentum_params: Any, extra: Any, batch: Any, rng: Array, step: Array
    ) -> tuple[Array, Any, dict[str, Array]]:
        """Weighted sum of the objectives that have a weight.

        All text encoder passes are one batch and so are all fusion passes; the texts of one
        picture share whatever fusion computes from the picture alone.
        """
        objectives = self.config.objectives

        def key(purpose: str) -> Array:
            return jax.random.fold_in(rng, zlib.crc32(purpose.encode()) & 0x7FFFFFFF)

        texts = self._texts(key("mlm"), batch)
        encoded = self._encode(params, batch["image"], texts, key("dropout/encode"))

        teacher, alphas = None, dict.fromkeys(("itc", "mlm", "prefix"), 0.0)
        if momentum_params is not None:
            teacher = self._encode(momentum_params, batch["image"], texts, None)
            ramp = objectives.alpha_ramp_steps
            alphas = {n: alpha_ramp(step, objectives[n].alpha, ramp) for n in alphas}

        losses: dict[str, tuple[Array, Array]] = {}
        itc = self._itc(params, encoded, teacher, extra, batch, alphas["itc"])
        losses["itc"] = itc.loss_sum, itc.count
        if extra is not None:
            extra = enqueue(
                extra, teacher.image_feats, teacher.text_feats, batch["image_id"], batch["valid"]
            )
        hardness = alpha_ramp(step, 1.0, objectives.itm.hard_ramp_steps)
        rows = self._fused_rows(key("itm"), itc, batch, hardness)
        outputs = self._fused_outputs(params, encoded, texts, rows, key("dropout/fuse"))
        taught = {"mlm": None, "prefix": None}
        if teacher is not None and (objectives.mlm.alpha or objectives.prefix.alpha):
            same = self._fused_rows(None, None, batch)
            taught |= self._fused_outputs(momentum_params, teacher, texts, same, None)
            taught = jax.lax.stop_gradient(taught)
        softmax_axis = "sequence" if objectives.official_sequence_softmax else "vocabulary"
        valid = batch["valid"]
        if "itm" in outputs:
            losses["itm"] = itm_loss(outputs["itm"], rows["itm_labels"], rows["itm_mask"])
        if objectives.mlm.weight:
            losses["mlm"] = mlm_loss(
                outputs["mlm"],
                texts.labels,
                texts.label_mask,
                self._keep("mlm", valid),
                taught["mlm"],
                alphas["mlm"],
                softmax_axis,
            )
        if objectives.prefix.weight:
            losses["prefix"] = prefix_lm_loss(
                outputs["prefix"],
                texts.targets,
                texts.target_mask,
                self._keep("prefix", valid),
                taught["prefix"],
                alphas["prefix"],
                softmax_axis,
            )
        means = {n: s / jnp.maximum(c, 1.0) for n, (s, c) in losses.items()}
        metrics = {f"loss_{n}": means[n] for n in means if objectives[n].weight}
        total = sum(objectives[n].weight * means[n] for n in means)
        return total, extra, metrics | self._diagnostics(params, itc, batch)

    def _apply(self, params: Any, rng: Array | None, method: str, *args: Any) -> Any:
        rngs = {} if rng is None else {"dropout": rng}
        return self.setup.model.apply({"params": params}, *args, method=method, rngs=rngs)

    def _texts(self, rng: Array, batch: Any) -> Texts:
        """The rows that the text encoder reads, MLM's corrupted here, and what they predict."""
        t, pools = self.setup.tokenizer, self._pools(len(batch["valid"]))
        text_ids, text_mask = batch["text_ids"], batch["text_mask"]
        mlm_mask = self._keep("mlm", text_mask)
        prefix = {
            name: self._keep("prefix", batch[name])
            for name in ("prefix_ids", "prefix_mask", "target_ids", "target_mask")
        }
        masked, labels, label_mask = mask_tokens(
            rng,
            self._keep("mlm", text_ids),
            mlm_mask,
            mask_id=t.mask_id,
            special_ids=(t.pad_id, t.unk_id, t.cls_id, t.sep_id, t.mask_id),
            vocab_size=t.vocab_size,
            rate=self.config.objectives.mlm.rate,
        )
        return Texts(
            ids=join_parts((text_ids, masked, prefix["prefix_ids"]), pools),
            mask=join_parts((text_mask, mlm_mask, prefix["prefix_mask"]), pools),
            labels=labels,
            label_mask=label_mask,
            targets=prefix["target_ids"],
            target_mask=prefix["target_mask"],
        )

    def _encode(self, params: Any, image: Array, rows: Texts, rng: Array | None) -> Encoded:
        image_embeds = self._apply(params, rng, "encode_image", image)
        texts = self._apply(params, rng, "encode_text", rows.ids, rows.mask)
        (own,) = split_parts(texts, (len(image),), self._pools(len(image)))
        return Encoded(
            image_embeds,
            texts,
            self._apply(params, None, "project_image", image_embeds),
            self._apply(params, None, "project_text", own),
        )

    def _itc(
        self,
        params: Any,
        online: Encoded,
        teacher: Encoded | None,
        queue: Any,
        batch: Any,
        alpha: Any,
    ) -> ITCOutput:
        return itc_loss(
            online.image_feats,
            online.text_feats,
            None if teacher is None else teacher.image_feats,
            None if teacher is None else teacher.text_feats,
            queue,
            batch["image_id"],
            batch["valid"],
            self._apply(params, None, "temperature"),
            alpha,
        )

    def _pools(self, size: int) -> int:
        """The number of pools of rows within which ITM draws negatives, of a batch of ``size``."""
        pool = self.config.objectives.itm.pool or size
        return size // min(pool, size)

    def _kept(self, name: str, size: int) -> np.ndarray:
        """Rows of each pool of ``size`` that an objective trains on: its ``fraction`` of them."""
        objective = self.config.objectives[name]
        count = max(round(objective.fraction * size), 1) if objective.weight else 0
        # Evenly spaced, so that each device keeps the same number of its own pairs.
        return np.arange(count) * size // max(count, 1)

    def _keep(self, name: str, x: Array) -> Array:
        """The rows of ``x [B, ...]`` that an objective trains on, in order."""
        pools = self._pools(len(x))
        kept = self._kept(name, len(x) // pools)
        if len(kept) == len(x) // pools:
            return x
        return x.reshape(pools, -1, *x.shape[1:])[:, kept].reshape(-1, *x.shape[1:])

    def _fused_rows(
        self, rng: Array | None, itc: ITCOutput | None, batch: Any, hardness: Array | float = 1.0
    ) -> dict[str, Array]:
        """Which (picture, text row) pairs go through fusion: of G pools each in the order itm,
        mlm, prefix.

        ``image`` and ``text [G, N / G]`` index the pool's pictures and its stacked text rows;
        ``itm``, ``mlm``, ``prefix`` are the numbers of rows. Without ``itc`` there are no ITM rows.
        ``hardness``: of ITM's negatives, 0: any pair is as likely, 1: as the similarities say.
        """
        pools = self._pools(len(batch["valid"]))
        start = size = len(batch["valid"]) // pools
        images, texts, rows = [], [], {"itm": 0, "mlm": 0, "prefix": 0}
        objectives = self.config.objectives

        def everywhere(index: np.ndarray) -> Array:
            return jnp.broadcast_to(index, (pools, len(index)))

        if itc is not None and objectives.itm.weight:
            negatives = sample_negatives(
                rng,
                jax.lax.stop_gradient(hardness * itc.image_to_text),
                jax.lax.stop_gradient(hardness * itc.text_to_image),
                batch["image_id"],
                batch["valid"],
                pools,
            )
            chosen = self._kept("itm", size)
            other_image, other_text = (
                x.reshape(pools, size)[:, chosen] % size
                for x in (negatives.image_for_text, negatives.text_for_image)
            )
            own = everywhere(chosen)
            images += [own, other_image, own]
            texts += [own, own, other_text]
            mask = itm_mask(batch["valid"], negatives).reshape(3, pools, size)[..., chosen]
            rows["itm"] = mask.size
            rows["itm_mask"] = mask.swapaxes(0, 1).reshape(-1)
            rows["itm_labels"] = jnp.tile(itm_labels(len(chosen)), pools)
        for name in ("mlm", "prefix"):
            if objectives[name].weight:
                kept = self._kept(name, size)
                images.append(everywhere(kept))
                texts.append(everywhere(start + np.arange(len(kept))))
                start += len(kept)
                rows[name] = pools * len(kept)
        if images:
            rows["image"], rows["text"] = (jnp.concatenate(x, axis=1) for x in (images, texts))
        return rows

    def _fused_outputs(
        self, params: Any, encoded: Encoded, texts: Texts, rows: Any, rng: Array | None
    ) -> dict[str, Array]:
        """ITM logits, MLM logits and the decoder's logits of the prefix LM targets."""
        outputs: dict[str, Array] = {}
        if "image" not in rows:
            return outputs
        text_mask = take_rows(texts.mask, rows["text"])
        image, text = self._apply(
            params,
            rng,
            "fuse",
            encoded.image,
            take_rows(encoded.texts, rows["text"]),
            text_mask,
            rows["image"],
            rows["prefix"],
        )
        sizes, pools = (rows["itm"], rows["mlm"], rows["prefix"]), len(rows["image"])
        itm, mlm, prefix = split_parts(text, sizes, pools)
        if rows["itm"]:
            outputs["itm"] = self._apply(params, None, "match", itm)
        if rows["mlm"]:
            outputs["mlm"] = self._apply(params, None, "mlm_logits", mlm)
        if rows["prefix"]:
            prefix_mask = split_parts(text_mask, sizes, pools)[-1]
            memory, memory_mask = self._apply(params, None, "memory", image, prefix, prefix_mask)
            outputs["prefix"] = self._apply(
                params, rng, "decode", texts.targets[:, :-1], memory, memory_mask
            )
        return outputs

    def _diagnostics(self, params: Any, itc: ITCOutput, batch: Any) -> dict[str, Array]:
        """In-batch text retrieval accuracy and the temperature."""
        ids, valid = batch["image_id"], batch["valid"]
        best = jnp.where(valid[None, :], itc.image_to_text, -jnp.inf).argmax(axis=1)
        hits = (ids[best] == ids) & valid
        return {
            "itc_accuracy": hits.sum() / jnp.maximum(valid.sum(), 1),
            "temperature": self._apply(params, None, "temperature"),
        }

    def evaluators(self, mesh: Any) -> dict[str, Any]:
        """The evaluators of ``config.evals`` by name."""
        return build_evaluators(self.setup, mesh)
