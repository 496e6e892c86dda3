"""VLMModule in whole runs: the steps of one process, rates by part, checkpoints and exports."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningDataModule, Trainer
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen3VLProcessor

from omnilit.callbacks import CheckpointSaver
from omnilit.modules import VLMModule
from omnilit.strategies import OmniStrategy
from omnilit.testing import run_ranks
from omnilit.types import MicroBatch, StepStamp
from tests.helpers import training
from tests.helpers.media_models import media_config, sample
from tests.helpers.media_spread import Case, rows_of
from tests.helpers.processors import build_processor

pytestmark = [pytest.mark.dist, pytest.mark.timeout(240)]
STEPS, SAVED = 4, 2
ROWS = ("kinds apart", "no image", "image last", "one image")  # one a step


class Loader:
    """Gives what is there already."""

    def __init__(self, batches: list[MicroBatch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[MicroBatch]:
        return iter(self.batches)


class Rows(LightningDataModule):
    """The same rows for any number of ranks, of which some have no image.

    Args:
        names: Of each step's rows.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = names

    def train_dataloader(self) -> Loader:
        """What this rank takes of each step."""
        assert self.trainer is not None
        strategy = self.trainer.strategy
        assert isinstance(strategy, OmniStrategy)
        topology = strategy.topology
        own: list[MicroBatch] = []
        for name in self.names:
            rows, size = rows_of(Case("qwen3_vl", rows=name)), topology.data_size
            counts = {"tokens": float(sum(row.counts["tokens"] for row in rows))}
            number = len(rows) // size
            for index in range(number):
                at = rows[index * size :][:size]
                media = frozenset[str]().union(*(one.modalities for one in at))
                stamp = StepStamp(counts, sum(r.num_tokens for r in rows), index, number, 0, media)
                own.append(replace(at[topology.data_rank], stamp=stamp))
        return Loader(own)


def run(folder: Path, out: str, sizes: dict[str, Any], resume: str | None = None) -> dict[str, Any]:
    """Four steps, saved at the second, or the last two of them from a checkpoint."""
    arguments = training.arguments(
        folder / out,
        vit_lr=1e-3,
        accelerator=sizes,
        checkpoint={"save_steps": SAVED} if resume is None else {},
    )
    module = VLMModule(config_path=str(folder / "model"), train=arguments)
    log, world = training.StepLog(), dist.get_world_size()
    data_size = world // sizes.get("ulysses_size", 1)
    trainer = Trainer(
        accelerator="cpu",
        devices=world,
        strategy=OmniStrategy(arguments.accelerator),
        max_epochs=1,
        accumulate_grad_batches=4 // data_size,
        callbacks=[log, CheckpointSaver(arguments.checkpoint)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder / out,
    )
    trainer.ckpt_path = folder / resume / f"checkpoints/global_step_{SAVED}" if resume else None
    trainer.fit(module, datamodule=Rows(ROWS[SAVED:] if resume else ROWS))
    if resume is None:
        module.export_weights(folder / out / "hf_ckpt")
    return {
        "numbers": training.numbers(log),
        "flops": [result.flops for result in log.results],
        "lr": dict(log.results[-1].lr),
        "last": training.weights_of(module),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    build_processor("Qwen3VL").save_pretrained(folder / "model")
    media_config("qwen3_vl", vocab=300).save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def one(folder, tmp_path_factory):
    return run_ranks(run, 1, folder, "one", {}, tmp_path=tmp_path_factory.mktemp("one"))[0]


def run_two(folder: Path) -> list[dict[str, Any]]:
    resumed = run(folder, "resumed", {"ulysses_size": 2}, "one")
    return [run(folder, "two", {}), resumed]


@pytest.fixture(scope="module")
def two(folder, one, tmp_path_factory):
    return run_ranks(run_two, 2, folder, tmp_path=tmp_path_factory.mktemp("two"), timeout_s=200)


def test_two_ranks_train_the_steps_of_one_process(one, two):
    for rank in two:
        for mine, theirs in zip(rank[0]["numbers"], one["numbers"], strict=True):
            assert (mine[0], mine[3]) == (theirs[0], theirs[3])
            assert mine[1:3] == pytest.approx(theirs[1:3], rel=1e-5)
        assert rank[0]["flops"] == pytest.approx(one["flops"])
    assert one["flops"][0] > one["flops"][1]  # a step without images


def test_a_run_goes_on_with_split_sequences_where_it_was_saved(one, two):
    found = two[0][1]["numbers"]
    assert [step for step, *_ in found] == [3, 4]
    for mine, theirs in zip(found, one["numbers"][SAVED:], strict=True):
        assert mine[1:3] == pytest.approx(theirs[1:3], rel=1e-5)


def test_the_tower_has_a_rate_of_its_own(one):
    assert one["lr"] == {"vision_tower": 1e-3, "backbone": 1e-2}


def test_plain_transformers_loads_the_export_and_sees_the_same(folder, one):
    exported = AutoModelForImageTextToText.from_pretrained(folder / "one" / "hf_ckpt").eval()
    assert type(exported).__name__ == "Qwen3VLForConditionalGeneration"
    assert type(AutoProcessor.from_pretrained(folder / "one" / "hf_ckpt")) is Qwen3VLProcessor
    plain = AutoModelForImageTextToText.from_config(exported.config)
    plain.load_state_dict(one["last"], strict=False)
    prompt = sample("qwen3_vl", 9, seed=3, images=[(1, 4, 6)])
    given = {"input_ids": prompt.ids[None], **prompt.media, "mm_token_type_ids": prompt.token_types}
    with torch.no_grad():
        assert torch.equal(exported(**given).logits, plain.eval()(**given).logits)
