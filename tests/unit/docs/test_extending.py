"""Each extension point, as the guide shows it."""

from __future__ import annotations

import sys
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from omnilit import plugins
from omnilit.cli.plan import RunPlan, make_plan, read
from omnilit.cli.raw import read_command
from omnilit.data.collate import COLLATORS, CollateSettings, collate
from omnilit.data.files import DATASET_TYPES, DataFile, list_files
from omnilit.data.messages import Conversation, Turn
from omnilit.data.readers import read_rows
from omnilit.data.templates import select_template
from omnilit.data.transforms import TransformSettings, build_transform
from omnilit.errors import DataError
from omnilit.kernels import RMS_NORM, rms_norm
from omnilit.kernels.machine import Machine
from omnilit.types import IGNORE, Origin, Record, Sample
from tests.helpers.guide import write_guide
from tests.helpers.plugins import forget_imports, write_distribution
from tests.helpers.tokenizers import build_tokenizer

CPU = Machine(device="cpu")


@pytest.fixture(scope="session")
def guide(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The files of the guide, where Python finds them.

    They stay there to the end: whoever lists the subclasses of a base imports their modules.
    """
    folder = tmp_path_factory.mktemp("guide")
    sys.path.insert(0, str(folder))
    (folder / "models" / "Qwen3-0.6B").mkdir(parents=True)
    (folder / "train.jsonl").write_text("{}\n")
    return write_guide(folder)


@pytest.fixture(autouse=True)
def _in_the_guide(guide: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The guide's folder as the working directory, and nothing of it registered yet."""
    forget_imports(monkeypatch)
    monkeypatch.chdir(guide["task.yaml"].parent)
    for name in ("my_package.register", "my_package.names"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(None)


def plan(*files: str) -> RunPlan:
    """A run with these files of the guide."""
    words = [word for file in files for word in ("--config", file)]
    base = ["--trainer.accelerator", "cpu"]
    if "countdown.yaml" not in files:
        base += ["--data.train_path", "train.jsonl"]
    if "task.yaml" not in files:
        base += ["--model.model_path", "models/Qwen3-0.6B"]
    return make_plan("fit", read_command([*base, *words]))


def record(**fields: object) -> Record:
    return Record(fields, Origin("train", "d.jsonl", 7))


def test_every_module_of_the_guide_can_be_imported(guide):
    modules = [name for name in guide if name.endswith(".py")]
    assert len(modules) > 8
    for name in modules:
        assert import_module(name.removesuffix(".py").replace("/", "."))


def test_the_task_is_chosen_with_its_own_argument(guide):
    chosen = plan("task.yaml")
    assert chosen.task.module_class.__name__ == "FocalModule"
    assert chosen.view["model.gamma"] == 2.0
    assert "gamma" in {f.path.rpartition(".")[2] for f in read(read_command(
        ["--config", "task.yaml"])).fields}  # fmt: skip


def test_the_kernel_is_chosen_and_agrees_with_the_reference(guide):
    assert plan("kernel.yaml").kernels.names()["rms_norm_implementation"] == "mine"
    mine = RMS_NORM.resolve("mine", CPU)
    for offset in (0.0, 1.0):
        found = []
        for kernel in (mine, rms_norm.eager):
            x = torch.linspace(-2, 3, 33).reshape(3, 11).requires_grad_()
            weight = torch.linspace(0.5, 2, 11).requires_grad_()
            y = kernel(x, weight, eps=1e-6, offset=offset)
            y.square().sum().backward()
            found.append((y, x.grad, weight.grad))
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_the_plug_in_is_found_and_registers(guide, tmp_path, monkeypatch):
    project = tomllib.loads(guide["pyproject.toml"].read_text())["project"]
    assert list(project["entry-points"]) == [plugins.GROUP]
    monkeypatch.syspath_prepend(tmp_path)
    write_distribution(tmp_path, "my-package", project["entry-points"][plugins.GROUP])
    plugins.load_plugins({plugins.OFF: "my_plugin"})
    assert "mine" not in RMS_NORM
    plugins.load_plugins({})
    assert "mine" in RMS_NORM


def test_the_reader_gives_rows_from_any_place(guide):
    assert plan("countdown.yaml").view["data.train_path"] == "100"
    (file,) = list_files("3", key="data.train_path", datasets_type="my_package.countdown:Countdown")
    rows = [row.data for row in read_rows(file, start=1)]
    assert rows == [{"content_split": "2 and then 1"}, {"content_split": "1 and then 0"}]


def test_the_transform_trains_every_second_line(guide, tokenizer):
    name = plan("transform.yaml").view["data.transform"]
    transform = build_transform(TransformSettings(transform=name, max_seq_len=30), tokenizer)
    (sample,) = transform.encode([record(lines=["Hi", "Hello!", "Bye", "See you"])]).samples
    trained = sample.labels[sample.labels != IGNORE].tolist()
    assert tokenizer.decode(sample.input_ids.tolist()) == "Hi\nHello!\nBye\nSee you\n"
    assert tokenizer.decode(trained) == "Hello!\nSee you\n"
    with pytest.raises(DataError, match=r"d\.jsonl:7: it has no lines"):
        transform.encode([record(lines=[])])


@pytest.mark.parametrize(
    ("name", "text", "trained"),
    [
        ("my_package/arrow.jinja", "=> Hi\n<= Hello!<|endoftext|>\n", "Hello!<|endoftext|>"),
        ("my_package.texts:SHORT", "user: Hi\nassistant: Hello!<|endoftext|>\n", "Hello!<|endoft"),
    ],
)
def test_the_templates_mark_what_the_assistant_says(guide, tokenizer, name, text, trained):
    template = select_template(name, tokenizer)
    turns = (Turn("user", "Hi", 0.0), Turn("assistant", "Hello!", 1.0))
    conversation = Conversation(turns, ())
    template.check_header(conversation, record())
    rendered = template.render(conversation, record())
    ((start, end),) = rendered.spans
    assert rendered.text == text
    assert text[start:end].startswith(trained)
    assert plan("template.yaml").view["data.chat_template"] == "my_package/arrow.jinja"


def test_the_collator_changes_some_inputs_and_no_label(guide):
    noisy = COLLATORS.load(plan("collator.yaml").view["data.collator"])
    ids = np.arange(1, 2001, dtype=np.int32)
    samples = [Sample(ids, ids, Origin("train", "f", 3))]
    once, again, plain = (f(samples, CollateSettings()) for f in (noisy, noisy, collate))
    changed = (once.input_ids != plain.input_ids).float().mean()
    assert 0.05 < changed < 0.15
    assert torch.equal(once.input_ids, again.input_ids)
    assert torch.equal(once.labels, plain.labels)
    assert noisy([], CollateSettings()).num_tokens == 0


def test_short_names_stand_for_the_same(guide, tokenizer):
    view = plan("names.yaml").view
    assert (view["data.transform"], view["data.collator"]) == ("dialogue", "noisy")
    assert DATASET_TYPES.load("countdown")("2").fingerprint() == "countdown-2"
    files = list_files("2", key="k", datasets_type="countdown")
    assert files == [DataFile("2", "custom:countdown")]
    assert select_template("short", tokenizer).has_generation


def test_callbacks_and_loggers_are_taken_by_lightning(guide):
    assert len(plan("callbacks.yaml").trainer["callbacks"]) == 2


def test_a_callback_of_ones_own_stops_the_run(guide):
    from types import SimpleNamespace

    stop: Any = import_module("my_package.callbacks").StopAtLoss(0.5)
    for loss, is_over in ((0.7, False), (0.4, True)):
        trainer = SimpleNamespace(should_stop=False)
        module = SimpleNamespace(step_result=SimpleNamespace(loss=loss))
        stop.on_train_batch_end(trainer, module, None, None, 0)
        assert trainer.should_stop == is_over
