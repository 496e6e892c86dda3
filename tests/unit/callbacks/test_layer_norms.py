"""Gradient norms a block: all of the gradient, by name, at the steps asked for."""

from __future__ import annotations

import json
import math

import pytest
import torch

from omnilit.callbacks.layer_norms import LayerGradNorms, group_by_block
from omnilit.callbacks.metrics import MetricsRecorder
from tests.helpers.models import tiny


def test_every_parameter_is_in_one_group_named_as_in_the_model():
    module = torch.nn.Module()
    module.model = tiny("qwen3")
    module.model.model.norm.weight.requires_grad_(False)
    groups = group_by_block(module)
    assert list(groups) == ["model.embed_tokens", "model.layers.0", "model.layers.1", "lm_head"]
    found = [id(parameter) for group in groups.values() for parameter in group]
    trained = [id(p) for p in module.parameters() if p.requires_grad]
    assert sorted(found) == sorted(trained)


@pytest.mark.parametrize(("every", "steps"), [(0, []), (1, [1, 2, 3, 4]), (2, [2, 4])])
def test_the_norms_stand_in_the_lines_of_the_steps_asked_for(
    make_module, make_trainer, tmp_path, every, steps
):
    trainer = make_trainer(LayerGradNorms(every), MetricsRecorder(tmp_path), gradient_clip_val=0.1)
    trainer.fit(make_module())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    # the gradient of the one weight is the sum of two inputs of 1, halved; clipping comes later
    found = {line["step"]: line["grad_norm/net"] for line in lines if "grad_norm/net" in line}
    assert found == dict.fromkeys(steps, pytest.approx(1.0))


def test_a_norm_that_is_not_finite_is_null_in_the_line(make_module, make_trainer, tmp_path):
    class Broken(make_module):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * math.nan

    make_trainer(LayerGradNorms(1), MetricsRecorder(tmp_path)).fit(Broken())
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert line["grad_norm/net"] is None
