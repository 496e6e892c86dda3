"""A run whose blocks are compiled is the run that it is without, and few graphs serve all steps.

The compiler's front half does the work here: what it captures runs as torch's own operations, so
nothing waits for a C++ compiler. `tests/invariant/test_compilation.py` has the whole of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from omnilit.models.attention import BOUNDARY
from omnilit.modules import OmniModule
from omnilit.testing import run_ranks
from tests.helpers import training

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]
STEPS = 8


class Graphs(training.StepLog):
    """How many graphs there are, and how long the micro-batch was, after every one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.graphs: list[int] = []
        self.lengths: list[int] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, OmniModule)
        compilation = pl_module.assembled.compilation
        self.graphs.append(compilation.num_graphs if compilation is not None else 0)
        self.lengths.append(batch.input_ids.shape[1])


def run(folder: Path, is_on: bool) -> dict[str, Any]:
    torch.compiler.set_default_backend("eager")
    graphs = Graphs()
    settings = training.arguments(
        folder / f"run_{is_on}",
        max_steps=STEPS,
        global_batch_size=4,
        enable_compile=is_on,
        recompute=True,
        checkpoint={"save_steps": STEPS},
    )
    log, module = training.train(folder, settings, callbacks=(graphs,))
    compilation = module.assembled.compilation
    module.export_weights(folder / f"export_{is_on}")
    return {
        "numbers": training.numbers(log),
        "weights": training.weights_of(module),
        "names": [name for name, _ in module.assembled.model.named_parameters()],
        "graphs": graphs.graphs,
        "lengths": graphs.lengths,
        "attentions": module.binding._counter.of("attn_implementation"),
        "breaks": compilation.breaks if compilation is not None else {},
    }


def test_a_run_on_two_ranks_is_the_same_compiled_in_few_graphs(tmp_path):
    training.write_model(tmp_path / "model")
    training.write_conversations(tmp_path / "train.jsonl", 60)
    ranks = [
        run_ranks(run, 2, tmp_path, is_on, tmp_path=tmp_path, timeout_s=250)
        for is_on in (False, True)
    ]
    for plain, compiled in zip(*ranks, strict=True):
        assert compiled["numbers"] == plain["numbers"]  # the same operations in the same order
        assert compiled["names"] == plain["names"]
        assert len(set(compiled["lengths"])) > 4, "the case must have many lengths"
        # Four parts of a block; one segment or several, and a first length that looks fixed,
        # may each need one of them anew.
        assert 4 <= compiled["graphs"][0] <= compiled["graphs"][-1] <= 10
        assert compiled["graphs"][-STEPS:] == [compiled["graphs"][-1]] * STEPS  # the later half
        # two micro-batches through two blocks, and each again for its backward, in the first step
        assert plain["attentions"] == compiled["attentions"] == 8
        assert plain["graphs"][-1] == 0
        assert all(BOUNDARY in reason for reason in compiled["breaks"])
    assert training.is_bit_equal(ranks[1][0]["weights"], ranks[0][0]["weights"])
    exports = [tmp_path / f"export_{is_on}" for is_on in (False, True)]
    names, others = (sorted(path.name for path in folder.iterdir()) for folder in exports)
    assert names == others
