"""Options of the config reach the objectives of pre-training (seen while tracing)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import quickstart
from mplug_jax.objectives.mlm import mlm_loss
from mplug_jax.objectives.prefix_lm import prefix_lm_loss
from mplug_jax.tasks import pretrain
from tests.small_runs import few_texts


@pytest.mark.parametrize(("official", "axis"), [(False, "vocabulary"), (True, "sequence")])
def test_the_softmax_axis_reaches_both_distilled_losses(tmp_path, monkeypatch, official, axis):
    seen = {}
    for loss in (mlm_loss, prefix_lm_loss):

        def watched(*arguments, loss=loss):
            teacher_logits, _, softmax_axis = arguments[-3:]
            assert teacher_logits is not None
            seen[loss.__name__] = softmax_axis
            return loss(*arguments)

        monkeypatch.setattr(pretrain, loss.__name__, watched)

    config = quickstart.get_config()
    config.objectives.momentum = 0.9
    config.objectives.mlm.alpha = config.objectives.prefix.alpha = 0.4
    config.objectives.official_sequence_softmax = official
    config.data.train = ({**config.data.train[0], "size": 8},)
    few_texts(config, 64)
    task = pretrain.Pretrain(config, str(tmp_path))
    examples = [task.make_example(task.sources[0][0][i], np.random.default_rng(0)) for i in (0, 1)]
    batch = {name: np.stack([example[name] for example in examples]) for name in examples[0]}
    batch |= {"valid": np.ones(2, bool)}

    def loss(batch):
        params = nn.meta.unbox(task.init_params(jax.random.key(0)))
        return task.loss(params, params, None, batch, jax.random.key(1), jnp.int32(0))[0]

    assert jax.eval_shape(loss, batch).shape == ()
    assert seen == {"mlm_loss": axis, "prefix_lm_loss": axis}
