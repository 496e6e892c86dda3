"""Training runs of a class side by side: the same steps, gradients and checkpoints, or not."""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from omnilit.checkpoint.dcp import load_tensors, named_state
from omnilit.checkpoint.save import TENSORS
from omnilit.config import TrainingArguments
from omnilit.logging import format_table
from omnilit.modules import OmniModule, SFTModule, VLMModule
from omnilit.strategies import OmniStrategy
from omnilit.testing import run_ranks
from tests.helpers import training
from tests.helpers.gradients import compare
from tests.helpers.layouts import Deviation, Layout, Watcher, deviation, join_stages
from tests.helpers.media_runs import ROW, write_ragged_questions, write_seeing_model
from tests.helpers.members import Equivalence, sizes_of, why_left_out

NUM_LONG, NUM_SHORT, BATCH = 33, 8, 8  # a pass: four whole steps, and one micro-batch of the fifth
STEPS_PER_PASS = 5
SAVED_AT = 7  # inside of the second pass
JOBS_AT_ONCE = 5
LOSS, GRADIENT = 1e-5, 1e-4
Result = dict[str, Any]
Key = tuple[str, str]
SEEING = "seeing.jsonl"
WORK = "encoder_load/max_over_mean"
Cuts = frozenset[tuple[str, tuple[int, ...], tuple[int, ...]]]


def write_inputs(folder: Path, classes: Iterable[Equivalence]) -> None:
    """Models, and ragged conversations of which a pass ends in a step with one micro-batch.

    In that step most ranks have nothing but filling, and in the one micro-batch the labels stand
    so far behind that ranks which split its sequence have none either.
    """
    for one in classes:
        write = write_seeing_model if one.is_seeing else training.write_model
        write(folder / one.name, **one.model)
    write_ragged_questions(folder / SEEING)
    draw = random.Random(0)

    def turn(user: tuple[int, int], answer: tuple[int, int]) -> list[dict[str, str]]:
        lengths = zip(("user", "assistant"), (user, answer), strict=True)
        return [
            {"role": role, "content": " ".join(draw.choices(training.WORDS, k=draw.randint(*k)))}
            for role, k in lengths
        ]

    rows = [
        turn((10, 14), (2, 6)) + (turn((1, 3), (1, 3)) if draw.random() < 0.4 else [])
        for _ in range(NUM_LONG)  # two of them do not fit into one micro-batch
    ]
    rows += [turn((1, 1), (1, 1)) for _ in range(NUM_SHORT)]
    lines = (json.dumps({"messages": messages}) + "\n" for messages in rows)
    (folder / "train.jsonl").write_text("".join(lines))


class StateAtSave(Callback):
    """Digests of every whole tensor that a checkpoint of one step holds, by name."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.digests: dict[str, str] = {}

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        assert isinstance(pl_module, OmniModule)
        if trainer.global_step == self.step and not self.digests:
            self.digests = digest_state(pl_module)


def digest_state(module: OmniModule) -> dict[str, str]:
    """Digests of all weights and moments, whole and of all stages, by name; every rank calls."""
    strategy = module.trainer.strategy
    assert isinstance(strategy, OmniStrategy)
    state = named_state(strategy._models(), strategy._named_optimizers())
    return join_stages(module, {name: _digest(tensor) for name, tensor in state.items()})


def _digest(tensor: Tensor) -> str:
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    values = full.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(values.numpy().tobytes(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Job:
    """One run of a member.

    Args:
        key: Class and member.
        layout: The member.
        steps: How many.
        is_saving: Keep a checkpoint of step `SAVED_AT`, and digests of what it holds.
        is_seeing: As `Equivalence.is_seeing`.
        broken: Makes a context in which some mechanism does not work.
        loads: Checkpoints to load; training goes on from the last one.
    """

    key: Key
    layout: Layout
    steps: int
    is_saving: bool = False
    is_seeing: bool = False
    broken: Callable[[], AbstractContextManager[object]] = nullcontext
    loads: tuple[Path, ...] = ()


def train_jobs(folder: Path, jobs: Sequence[Job]) -> list[Result]:
    """Run jobs one after the other on this rank of however many there are."""
    results: list[Result] = []
    for job in jobs:
        began = time.process_time()
        try:
            with job.broken():
                result = _resume(folder, job) if job.loads else _train(folder, job)
            results.append({**result, "cpu_s": time.process_time() - began})
        except BaseException as error:
            error.add_note(f"while training {' / '.join(job.key)}")
            raise
    return results


def _resume(folder: Path, job: Job) -> Result:
    """Load every checkpoint in turn, and train one step from the last one."""
    loads = LoadsOf(job.loads)
    log, _ = training.train(
        folder,
        _arguments(folder / "resumed" / "_".join(job.key), job),
        **_task(folder, job),
        callbacks=(loads,),
        load_path=job.loads[-1],
    )
    return {"numbers": training.numbers(log), "states": loads.digests}


def _task(folder: Path, job: Job) -> dict[str, Any]:
    """Which module trains which model on what, as `training.train` takes it."""
    data: dict[str, Any] = {"train_size": None}
    if job.is_seeing:
        data |= {"train_path": str(folder / SEEING), "max_seq_len": ROW}
    return {
        "module_class": VLMModule if job.is_seeing else SFTModule,
        "model": {"config_path": str(folder / job.key[0]), **job.layout.model},
        "data": data,
    }


def _arguments(out: Path, job: Job) -> TrainingArguments:
    settings = {
        "global_batch_size": BATCH,
        "num_train_epochs": job.steps // STEPS_PER_PASS,
        "checkpoint": {"save_steps": SAVED_AT, "save_epochs": 0} if job.is_saving else {},
        **job.layout.over,
    }
    return training.arguments(out, **settings)


def _train(folder: Path, job: Job) -> Result:
    watcher, state = Watcher(), StateAtSave(SAVED_AT if job.is_saving else -1)
    training.train(
        folder,
        _arguments(run_folder(folder, job.key), job),
        **_task(folder, job),
        callbacks=(watcher, state),
    )
    return {
        "numbers": training.numbers(watcher),
        "first": watcher.first_weights,
        "gradients": watcher.gradients,
        "labels": watcher.labels,
        "work": [result.shown for result in watcher.results if WORK in result.shown],
        "state": state.digests,
    }


def run_folder(folder: Path, key: Key) -> Path:
    """Where a member's run is kept."""
    return folder / "runs" / "_".join(key).replace(" ", "-").replace(",", "")


def saved(folder: Path, key: Key) -> Path:
    """A member's checkpoint."""
    return run_folder(folder, key) / "checkpoints" / f"global_step_{SAVED_AT}"


def read_cuts(checkpoint: Path) -> Cuts:
    """Where in its tensors the parts of a checkpoint begin and how large they are."""
    entries = FileSystemReader(checkpoint / TENSORS).read_metadata().state_dict_metadata
    return frozenset(
        (name, tuple(chunk.offsets), tuple(chunk.sizes))
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
        for chunk in entry.chunks
    )


def run_jobs(folder: Path, jobs: Iterable[Job], *, tmp_path: Path) -> dict[Key, list[Result]]:
    """Run jobs, several of one number of ranks in the same processes.

    Each layout has process groups of its own, and each group of gloo threads that look for work a
    hundred times a second: those of dozens of layouts would take a core from the one that runs.

    Returns:
        What each rank returned, by the jobs' keys.
    """
    found: dict[Key, list[Result]] = {}
    ordered = sorted(jobs, key=lambda job: job.layout.num_ranks)
    for num_ranks, same in groupby(ordered, key=lambda job: job.layout.num_ranks):
        waiting = list(same)
        for first in range(0, len(waiting), JOBS_AT_ONCE):
            batch = waiting[first : first + JOBS_AT_ONCE]
            limit = 120 + 60 * len(batch)
            ranks = run_ranks(
                train_jobs, num_ranks, folder, batch, tmp_path=tmp_path, timeout_s=limit
            )
            for job, results in zip(batch, zip(*ranks, strict=True), strict=True):
                found[job.key] = list(results)
    return found


def check_member(ranks: Sequence[Result], expected: Result) -> Deviation:
    """Hold a member against the first of its class.

    Raises:
        AssertionError: They are not the same run.
    """
    stories = {tuple(rank["numbers"]) for rank in ranks}
    assert len(stories) == 1, f"ranks tell {len(stories)} stories"
    compare(ranks[0]["gradients"], expected["gradients"], rtol=GRADIENT)
    far = deviation(ranks[0], expected)
    assert far.loss <= LOSS, f"a loss is off by {far.loss:.1e}"
    assert far.grad_norm <= LOSS, f"a gradient norm is off by {far.grad_norm:.1e}"
    first = ranks[0]["first"]
    assert training.is_bit_equal(first, expected["first"]), "it begins with other weights"
    return far


def check_labels(ranks: Sequence[Result]) -> None:
    """Check that a rank had a step without a single label.

    Raises:
        AssertionError: None had, so that the run proves less than it is for.
    """
    assert any(0 in rank["labels"] for rank in ranks), "every rank had a label in every step"


def splits_tokens(layout: Layout) -> bool:
    """Whether the ranks of a layout hold different tokens."""
    sizes = sizes_of(layout)
    return sizes.data_size * sizes.sequence_size > 1


def table(
    one: Equivalence,
    far: Mapping[str, Deviation],
    resumed: Mapping[str, float],
    wrong: Mapping[str, str],
) -> str:
    """How far the members of a class lie from its first; below it, what differs or is left out."""
    rows: list[tuple[str, ...]] = []
    notes: list[str] = []
    for member in one.members:
        name, reason = member.name, why_left_out(member)
        if reason is not None:
            notes.append(f"  {name} is left out: {reason}")
        elif name in wrong:
            notes.append(f"  {name} DIFFERS: {wrong[name]}")
        else:
            d = far[name]
            numbers = (d.loss, d.bias, d.grad_norm, d.gradient, resumed[name])
            rows.append((name, *(f"{number:.1e}" for number in numbers)))
    header = ("member", "loss, worst", "loss, mean", "gradient norm", "first gradients", "resumed")
    title = f"{one.name}: from {one.members[0].name}"
    return "\n".join([format_table(title, header, rows), *notes])


def work_lines(results: Mapping[Key, Sequence[Result]]) -> list[str]:
    """How even the vision tower's work was, where ranks share it: means over the steps."""
    lines: list[str] = []
    for (_, name), ranks in results.items():
        if shown := ranks[0]["work"]:
            before, after = (
                sum(step[key] for step in shown) / len(shown) for key in (f"{WORK}_before", WORK)
            )
            lines.append(
                f"  {name}: the busiest rank's tower work over the mean {before:.2f} -> {after:.2f}"
            )
    return lines


class LoadsOf(Callback):
    """Loads checkpoints into a run that is about to go on, and tells what they hold then."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = folders
        self.digests: list[dict[str, str]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, OmniModule)
        strategy = trainer.strategy
        assert isinstance(strategy, OmniStrategy)
        models, optimizers = strategy._models(), strategy._named_optimizers()
        for folder in self.folders:
            stages = strategy.topology.stages
            load_tensors(folder / TENSORS, models=models, optimizers=optimizers, stages=stages)
            self.digests.append(digest_state(pl_module))

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        trainer.should_stop = trainer.global_step > SAVED_AT
