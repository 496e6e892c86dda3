"""With fla installed and no GPU, models with linear attention train and generate as without it."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch

from omnilit.models.bind import bind_kernels
from omnilit.models.build import build_on
from omnilit.tools.chat import _load_model
from tests.helpers.models import gradients, packed_batch, reference_loss, tiny_config
from tests.helpers.models import worst_difference as worst
from tests.helpers.spread import cpu_kernels

pytestmark = pytest.mark.timeout(300)  # importing fla takes a while
FAMILIES = ("qwen3_5", "qwen3_5_moe", "qwen3_next")
PLAIN = """
import torch, transformers
from tests.helpers.models import tiny
model = tiny("qwen3_5")
print(model(torch.arange(3, 9)[None], use_cache=False).logits.shape)
"""


def built(family: str):
    torch.manual_seed(0)
    model = build_on("cpu", tiny_config(family), dtype=torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.train()


def test_transformers_alone_raises_here():
    done = subprocess.run(
        [sys.executable, "-c", PLAIN], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "active drivers" in done.stderr


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_training_equals_transformers_own_code(family, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("omnilit"), "propagate", True)
    is_first = f"transformers.models.{family}.modeling_{family}" not in sys.modules
    with caplog.at_level(logging.INFO, logger="omnilit"):
        plain, packed = built(family), built(family)
    told = caplog.text.count("no GPU: transformers is kept from fla")
    assert told == is_first
    batch = packed_batch((5, 1, 40, 9))
    expected = reference_loss(plain, batch)
    expected.backward()
    binding = bind_kernels(packed, cpu_kernels())
    loss = binding.head.forward(packed, batch).token_losses.sum() / batch.counts["tokens"]
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert worst(gradients(packed), gradients(plain)) <= 1e-4


def test_a_saved_model_is_loaded_and_generates(tmp_path):
    model = built("qwen3_5").eval()
    model.save_pretrained(tmp_path)
    loaded = _load_model(str(tmp_path)).eval()
    prompt = torch.arange(3, 9)[None]
    answers = [
        getattr(m, "generate")(prompt, max_new_tokens=4, do_sample=False)  # noqa: B009
        for m in (model, loaded)
    ]
    assert torch.equal(*answers)
    assert answers[0].shape == (1, 10)
