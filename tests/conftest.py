"""Fixtures for every test: fixed seeds, one thread, nothing left behind."""

from __future__ import annotations

import multiprocessing
import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import settings

from omnilit.testing import PRELOAD

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
multiprocessing.set_forkserver_preload(
    [
        *PRELOAD,
        "omnilit.callbacks",
        "omnilit.modules",
        "omnilit.strategies",
        "transformers.models.gemma3.modeling_gemma3",
        "transformers.models.qwen3.modeling_qwen3",
        "transformers.models.qwen3_moe.modeling_qwen3_moe",
    ]
)
torch.set_num_threads(1)
settings.register_profile("steady", deadline=None, derandomize=True)  # a busy machine is no fault
settings.load_profile("steady")
SET_BY_LIBRARIES = {
    "TORCHINDUCTOR_CACHE_DIR",  # torch, when it compiles
    "PYTORCH_NVML_BASED_CUDA_CHECK",  # lightning, when a test is the first to import it
}


@pytest.fixture(autouse=True)
def _same_world() -> Iterator[None]:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - what libraries use
    torch.manual_seed(0)
    before = dict(os.environ)
    yield
    left_behind = dist.is_available() and dist.is_initialized()
    if left_behind:
        dist.destroy_process_group()
    changed = {k for k in before.keys() | os.environ.keys() if before.get(k) != os.environ.get(k)}
    os.environ.clear()
    os.environ.update(before)
    changed -= {"PYTEST_CURRENT_TEST", *SET_BY_LIBRARIES}
    assert not left_behind, "the test left a process group"
    assert not changed, f"the test left changed variables: {sorted(changed)}"
