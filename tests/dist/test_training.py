"""The same steps at any number of ranks, and exactly where they were after a resume."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from omnilit.testing import run_ranks
from tests.helpers import training

pytestmark = [pytest.mark.dist, pytest.mark.timeout(180)]
STEPS = 5
SHORT = 16  # micro-batches of the first pass in the case of unequal ones


def on_ranks(function: Any, num_ranks: int, tmp_path: Path, *args: Any) -> list[Any]:
    return run_ranks(function, num_ranks, *args, tmp_path=tmp_path, timeout_s=150)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    training.write_model(folder / "model")
    training.write_model(folder / "moe", "qwen3_moe", output_router_logits=True)
    training.write_conversations(folder / "train.jsonl", 60)
    training.write_conversations(folder / "eval.jsonl", 9, seed=1)
    training.write_conversations(folder / "few.jsonl", 24, seed=2)
    return folder


def run(folder: Path, out: str, model: str, over: dict[str, Any]) -> dict[str, Any]:
    settings = {"global_batch_size": 4, "max_steps": STEPS, "eval_steps": 3, **over}
    log, module = training.train(
        folder,
        training.arguments(folder / out, **settings),
        model={"config_path": str(folder / model)},
        data={"eval_path": str(folder / "eval.jsonl")},
    )
    return {
        "numbers": training.numbers(log),
        "losses": [r.losses for r in log.results],
        "first": log.first_weights,
        "last": training.weights_of(module),
        "eval": module.eval_result,
    }


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    """One process, four micro-batches a step."""
    tmp_path = tmp_path_factory.mktemp("alone")
    return {
        model: run_ranks(
            run, 1, folder, f"one_{model}", model, {}, tmp_path=tmp_path, timeout_s=150
        )[0]
        for model in ("model", "moe")
    }


@pytest.mark.parametrize(("model", "num_ranks"), [("model", 2), ("model", 4), ("moe", 2)])
def test_ranks_and_accumulation_change_no_number(folder, alone, model, num_ranks, tmp_path):
    found = on_ranks(run, num_ranks, tmp_path, folder, f"{num_ranks}_{model}", model, {})
    expected = alone[model]
    assert training.is_bit_equal(found[0]["first"], expected["first"])
    for rank in found:
        assert len(rank["numbers"]) == STEPS
        for mine, theirs in zip(rank["numbers"], expected["numbers"], strict=True):
            assert mine[0] == theirs[0]
            assert mine[3] == theirs[3]
            assert mine[1:3] == pytest.approx(theirs[1:3], rel=1e-5)
        assert rank["eval"] == pytest.approx(expected["eval"], rel=1e-5)
    for name, weight in expected["last"].items():
        torch.testing.assert_close(found[0]["last"][name], weight, rtol=1e-4, atol=1e-5)


def test_the_balance_loss_is_a_term_of_its_own_and_part_of_the_loss(alone):
    for losses, numbers in zip(alone["moe"]["losses"], alone["moe"]["numbers"], strict=True):
        assert losses.keys() == {"lm", "balance"}
        assert losses["balance"] > 0
        assert numbers[1] == pytest.approx(sum(losses.values()))


def test_recomputation_changes_no_bit(folder, alone, tmp_path):
    over = {"recompute": True}
    (found,) = run_ranks(
        run, 1, folder, "recompute", "model", over, tmp_path=tmp_path, timeout_s=150
    )
    assert found["numbers"] == alone["model"]["numbers"]


def resume(folder: Path, out: str, over: dict[str, Any], step: int | None) -> Any:
    settings = {
        "global_batch_size": 2,
        "checkpoint": {"save_steps": 2},
        "num_train_epochs": 2,
        "max_steps": 4,
        **over,
    }
    path = folder / out / "checkpoints" / f"global_step_{step}" if step else None
    log, module = training.train(
        folder,
        training.arguments(folder / (f"{out}_again" if step else out), **settings),
        data={"train_size": over.pop("train_size", 10_000)},
        load_path=path,
    )
    return training.numbers(log), training.weights_of(module)


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    return run_ranks(
        resume,
        1,
        folder,
        "whole",
        {},
        None,
        tmp_path=tmp_path_factory.mktemp("whole"),
        timeout_s=150,
    )[0]


@pytest.mark.parametrize("step", [2, 4, 6])
def test_a_resumed_run_continues_to_the_bit(folder, undisturbed, step, tmp_path):
    ((numbers, weights),) = on_ranks(resume, 1, tmp_path, folder, "whole", {}, step)
    assert numbers == undisturbed[0][step:]
    assert training.is_bit_equal(weights, undisturbed[1])


def test_a_resume_on_two_ranks_trains_the_same_steps(folder, undisturbed, tmp_path):
    found = on_ranks(resume, 2, tmp_path, folder, "whole", {}, 2)
    for numbers, _ in found:
        for mine, theirs in zip(numbers, undisturbed[0][2:], strict=True):
            assert (mine[0], mine[3]) == (theirs[0], theirs[3])
            assert mine[1:3] == pytest.approx(theirs[1:3], rel=1e-5)


def test_a_raised_limit_goes_on_with_the_epoch(folder, undisturbed, tmp_path):
    over = {"max_steps": 8, "num_train_epochs": 1}
    ((numbers, _),) = on_ranks(resume, 1, tmp_path, folder, "whole", over, 4)
    assert [row[0] for row in numbers] == [5, 6, 7, 8]


class Rows(Callback):
    """Notes epoch and rows of every micro-batch that this rank trains on."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, list[int]]] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.seen.append((trainer.current_epoch, [origin.row for origin in batch.origins]))


def read_passes(
    folder: Path, out: str, data: dict[str, Any], over: dict[str, Any], step: int | None
) -> list[tuple[int, list[int]]]:
    """What this rank reads in a run whose epochs are passes, or in the rest of it from `step`."""
    rows = Rows()
    training.train(
        folder,
        training.arguments(folder / (f"{out}_again" if step else out), **over),
        data={"train_path": str(folder / "few.jsonl"), "train_size": None, **data},
        load_path=folder / out / "checkpoints" / f"global_step_{step}" if step else None,
        callbacks=(rows,),
    )
    return rows.seen


def count_reads(seen: list[tuple[int, list[int]]]) -> Counter[tuple[int, int]]:
    return Counter((epoch, row) for epoch, rows in seen for row in rows)


def every_record_once(num_epochs: int) -> Counter[tuple[int, int]]:
    return Counter((epoch, row) for epoch in range(num_epochs) for row in range(1, 25))


def test_a_resume_with_larger_steps_reads_every_record_once_an_epoch(folder, tmp_path):
    over: dict[str, Any] = {"num_train_epochs": 2, "checkpoint": {"save_steps": 7}}
    (seen,) = on_ranks(read_passes, 1, tmp_path, folder, "passes", {}, over, None)
    assert count_reads(seen) == every_record_once(2)
    num_items = [epoch for epoch, _ in seen].count(0)
    step = num_items // 7 * 7
    assert num_items / 2 < step < num_items, "as many steps as the epoch has on two ranks"
    one, two = on_ranks(read_passes, 2, tmp_path, folder, "passes", {}, over, step)
    assert count_reads([*seen[:step], *one, *two]) == every_record_once(2)
    assert len(one) == -(-(num_items - step) // 2) + -(-num_items // 2)


def test_passes_of_unequal_length_are_read_whole_also_after_a_resume(folder, tmp_path):
    data = {"dyn_bsz_buffer_size": 5}
    over = {"num_train_epochs": 3, "seed": 1, "checkpoint": {"save_steps": SHORT}}
    (seen,) = on_ranks(read_passes, 1, tmp_path, folder, "uneven", data, over, None)
    sizes = Counter(epoch for epoch, _ in seen)
    assert count_reads(seen) == every_record_once(3)
    assert sizes[0] == SHORT < sizes[1], "the case must be uneven"
    (rest,) = on_ranks(read_passes, 1, tmp_path, folder, "uneven", data, over, 2 * SHORT)
    assert rest == seen[2 * SHORT :]


def compare_with_transformers(folder: Path) -> list[tuple[float, float]]:
    """Loss of every record before the first update: ours, and plain transformers'."""
    from transformers import AutoModelForCausalLM, PreTrainedModel

    from omnilit.data.collate import collate
    from omnilit.data.planned import PlannedItems
    from omnilit.modules import OmniDataModule

    log, module = training.train(
        folder, training.arguments(folder / "oracle", max_steps=1, optimizer={"lr": 0.0})
    )
    config = module.model_config
    plain = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    assert isinstance(plain, PreTrainedModel)
    plain.load_state_dict(log.first_weights, strict=False)
    plain.tie_weights()
    datamodule = module.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
    assert isinstance(datamodule, OmniDataModule)
    items = datamodule.train_loader.items
    assert isinstance(items, PlannedItems)
    dataset = items.dataset
    pairs = []
    for index in range(len(dataset.lengths)):
        sample = dataset[index]
        with torch.no_grad():
            ours = module.assembled.forward(collate([sample])).token_losses.mean()
            ids = torch.tensor(sample.input_ids[None], dtype=torch.long)
            labels = torch.tensor(sample.labels[None], dtype=torch.long)
            theirs = plain(input_ids=ids, labels=labels, use_cache=False).loss
        pairs.append((ours.item(), theirs.item()))
    return pairs


def test_the_loss_before_the_first_update_is_plain_transformers_record_by_record(folder, tmp_path):
    (pairs,) = on_ranks(compare_with_transformers, 1, tmp_path, folder)
    assert len(pairs) == 60
    for ours, theirs in pairs:
        assert ours == pytest.approx(theirs, abs=1e-6, rel=1e-6)


def train_the_readmes_module(folder: Path) -> tuple[list[float], list[float]]:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    block = readme.split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {"__name__": "readme"}
    exec(compile(block, "README.md", "exec"), names)
    (own,) = [v for v in names.values() if isinstance(v, type) and v.__module__ == "readme"]
    runs = []
    for module_class in (own, training.SFTModule):
        settings = training.arguments(folder / module_class.__name__, max_steps=2)
        log, _ = training.train(folder, settings, module_class=module_class)
        runs.append([result.loss for result in log.results])
    return runs[0], runs[1]


def test_the_readmes_module_trains_and_changes_the_loss(folder, tmp_path):
    ((own, plain),) = on_ranks(train_the_readmes_module, 1, tmp_path, folder)
    assert len(own) == len(plain) == 2
    assert 0 < own[0] < plain[0]
