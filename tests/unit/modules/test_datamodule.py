"""What the data module refuses or says before a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GPT2Config, PretrainedConfig, Qwen3Config

from omnilit.config import CheckpointConfig, DataloaderConfig, TrainingArguments
from omnilit.data.quarantine import read_quarantine
from omnilit.errors import ConfigError, DataError
from omnilit.modules import OmniDataModule, SFTModule
from omnilit.modules.datamodule import check_positions
from tests.helpers.layouts import micro_batches
from tests.helpers.tokenizers import build_tokenizer


def say(max_seq_len: int, config: PretrainedConfig, caplog: pytest.LogCaptureFixture) -> list[str]:
    with caplog.at_level("WARNING", logger="omnilit"):
        check_positions(max_seq_len, config, is_loud=True)
    return [record.getMessage() for record in caplog.records]


def test_a_model_with_a_table_of_positions_refuses_longer_samples(
    caplog: pytest.LogCaptureFixture,
):
    config = GPT2Config(n_positions=64)
    assert say(64, config, caplog) == []
    with pytest.raises(ConfigError) as caught:
        check_positions(65, config, is_loud=False)
    assert str(caught.value) == (
        "data.max_seq_len: 65 tokens are more than the 64 positions of the model. "
        "To fix: give at most 64."
    )


def test_a_rotary_model_warns_of_longer_samples_on_one_rank(caplog: pytest.LogCaptureFixture):
    config = Qwen3Config(max_position_embeddings=64)
    assert say(64, config, caplog) == []
    check_positions(65, config, is_loud=False)
    (line,) = say(65, config, caplog)
    assert line.startswith("data.max_seq_len: 65 tokens are more than the 64 positions")


def test_a_model_that_names_no_positions_takes_any_length(caplog: pytest.LogCaptureFixture):
    assert say(10**6, PretrainedConfig(), caplog) == []


class OnOneRank(SFTModule):
    """In no process group."""

    @property
    def topology(self) -> Any:
        return SimpleNamespace(
            data_rank=0, data_size=1, is_first_of_data=True, device=torch.device("cpu"), stages=None
        )


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., OmniDataModule]:
    """A data module on one rank in the test's folder, with a tiny model, not yet set up."""
    monkeypatch.setenv("OMNILIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained("model")
    GPT2Config(vocab_size=len(tokenizer), n_positions=64).save_pretrained("model")

    def make(*, train: dict[str, Any] | None = None, **fields: Any) -> OmniDataModule:
        arguments = TrainingArguments(checkpoint=CheckpointConfig(output_dir="run"), **train or {})
        given = {"max_seq_len": 32, "dataloader": DataloaderConfig(num_workers=0), **fields}
        data = OmniDataModule(**given, train=arguments)
        module = OnOneRank(config_path="model", train=arguments)
        trainer = SimpleNamespace(lightning_module=module, accumulate_grad_batches=1)
        data.trainer = trainer  # pyright: ignore[reportAttributeAccessIssue]
        return data

    return make


def write(name: str, *texts: str) -> str:
    Path(name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return name


def test_what_is_skipped_is_written_down_before_the_limit_stops_the_run(
    build: Callable[..., OmniDataModule],
):
    file = write("a.jsonl", "good words", "more words")
    with Path(file).open("a") as lines:
        lines.write("{\n")
    data = build(train_path=file, data_type="plaintext", silent_exception=True)
    with pytest.raises(DataError, match=r"1 of 3 records are bad.*quarantine\.jsonl"):
        data.setup("fit")
    (bad,) = read_quarantine(Path("run/quarantine.jsonl"))
    assert (bad.file, bad.row) == (file, 3)


@pytest.mark.parametrize("kind", ["mapping", "iterable"])
def test_all_missing_sources_of_a_mixture_are_told_with_their_place(
    build: Callable[..., OmniDataModule], kind: str
):
    sources = ["gone.jsonl", write("a.jsonl", "x"), "no/where/b.csv, data.txt"]
    Path("mix.yaml").write_text(json.dumps({"sources": sources, "names": ["a", "b", "c"]}))
    with pytest.raises(ConfigError) as caught:
        build(train_path="mix.yaml", data_type="plaintext", datasets_type=kind).setup("fit")
    assert [str(problem).partition(" does not")[0] for problem in caught.value.problems] == [
        "data.train_path: mix.yaml: sources[0]: gone.jsonl",
        "data.train_path: mix.yaml: sources[2]: no/where/b.csv",
        "data.train_path: mix.yaml: sources[2]: data.txt",
    ]
    with pytest.raises(ConfigError, match=r"^data\.train_path: gone\.jsonl does not exist"):
        build(train_path="gone.jsonl", datasets_type=kind).setup("fit")


def test_a_source_may_be_called_like_the_evaluation(build: Callable[..., OmniDataModule]):
    write("a.jsonl", "some words", "more")
    write("b.jsonl", "others")
    mixture = {"sources": ["a.jsonl", "b.jsonl"], "names": ["eval", "b"]}
    Path("mix.yaml").write_text(json.dumps(mixture))
    data = build(train_path="mix.yaml", eval_path="b.jsonl", data_type="plaintext")
    data.setup("fit")
    assert [row[:2] for row in data.rows()[1]] == [("train/eval", 2), ("train/b", 1), ("eval", 1)]
    single = build(train_path="a.jsonl", data_type="plaintext", source_name="eval")
    single.paths["eval"] = "b.jsonl"
    single.setup("fit")
    assert [row[:2] for row in single.rows()[1]] == [("train/eval", 2), ("eval", 1)]


def test_evaluation_is_padded_as_training_is(build: Callable[..., OmniDataModule]):
    file = write("a.jsonl", "some words", "more and more and more")
    data = build(
        train_path=file,
        eval_path=file,
        data_type="plaintext",
        train_size=None,
        train={"pad_to_length": True},
    )
    data.setup("fit")
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert {batch.input_ids.shape for batch in micro_batches(loader)} == {(1, 32)}


def test_more_samples_a_step_than_there_are_is_refused_with_the_numbers(
    build: Callable[..., OmniDataModule],
):
    file = write("a.jsonl", "one", "two", "three")
    steps = {"dyn_bsz": False, "global_batch_size": 4}
    with pytest.raises(ConfigError) as caught:
        build(train_path=file, data_type="plaintext", train_size=None, train=steps).setup("fit")
    assert str(caught.value) == (
        "train.global_batch_size: a step takes 4 samples, but a pass has 3, and "
        "data.dataloader.drop_last leaves out a step that is not full: nothing would be trained. "
        "To fix: lower it, or set data.dataloader.drop_last: false."
    )
    kept = {"dataloader": DataloaderConfig(drop_last=False), "train": steps}
    data = build(train_path=file, data_type="plaintext", train_size=None, **kept)
    data.setup("fit")
    assert data.num_steps == 1


def test_setup_compares_the_length_with_the_models_positions(tmp_path: Path):
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    GPT2Config(vocab_size=len(tokenizer), n_positions=32).save_pretrained(tmp_path)
    data = OmniDataModule(train_path="nowhere.jsonl", max_seq_len=33)
    module = OnOneRank(config_path=str(tmp_path))
    data.trainer = SimpleNamespace(lightning_module=module)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ConfigError, match="33 tokens are more than the 32 positions"):
        data.setup("fit")


def test_a_buffer_of_the_default_size_that_is_given_packs_in_order(build):
    write("mixed.jsonl", *("a b c d e f g h i j k"[: 1 + 2 * (i % 11)] for i in range(40)))
    rows = {}
    for is_given in (False, True):
        data = build(train_path="mixed.jsonl", data_type="plaintext", train_size=None)
        data.is_buffer_size_given = is_given
        data.setup("fit")
        rows[is_given] = [batch.bounds for batch in data.train_loader]
    assert rows[False][0] != rows[True][0]
    assert len(rows[False]) <= len(rows[True])
