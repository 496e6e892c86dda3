"""The preference recipe in a short form: right against wrong documentation of a symbol."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig

from omnilit.config import DPOConfig
from omnilit.modules import DPOModule
from omnilit.testing import run_ranks
from tests.helpers import training
from tests.helpers.examples import load_example

pytestmark = [pytest.mark.dist, pytest.mark.timeout(180)]
ROOT = Path(__file__).parents[2]
MODULES = ("bisect", "heapq", "json")


@pytest.fixture
def folder(tmp_path):
    """Pairs of a few modules, in the recipe's own places, and a model smaller than the demo's."""
    load_example("stdlib_docs").write_dataset(tmp_path, MODULES)
    config = AutoConfig.from_pretrained(tmp_path / "model")
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 64, 128, 2
    config.layer_types = None
    config.save_pretrained(tmp_path / "model")
    return tmp_path


def run(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    settings = {"eval_epochs": 1, "micro_batch_size": 4, "num_train_epochs": 10}
    log, module = training.train(
        folder,
        training.arguments(folder / "run", **settings),
        module_class=DPOModule,
        model={"dpo_config": DPOConfig(**config)},
        data={
            "data_type": "dpo",
            "train_path": str(folder / "pairs" / "train.jsonl"),
            "eval_path": str(folder / "pairs" / "eval.jsonl"),
            "max_seq_len": 256,
            "train_size": None,
        },
    )
    return {"steps": log.results, "eval": module.eval_result}


def test_the_right_documentation_of_a_symbol_comes_to_be_preferred(folder, tmp_path):
    recipe = yaml.safe_load((ROOT / "configs" / "dpo" / "stdlib_docs.yaml").read_text())
    (found,) = run_ranks(run, 1, folder, recipe["dpo_config"], tmp_path=tmp_path, timeout_s=170)
    first, *_, last = found["steps"]
    assert first.loss == pytest.approx(math.log(2), abs=1e-5)
    assert last.loss < 0.5
    assert last.shown["rewards/accuracies"] > 0.8
    assert last.shown["rewards/margins"] > 0.5
