"""Classification: the same steps and evaluations at any number of ranks, on every axis."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from omnilit.callbacks import ConfusionTable
from omnilit.config import LoraArguments
from omnilit.errors import ConfigError, DataError
from omnilit.modules import ClassificationModule, SFTModule
from omnilit.testing import run_ranks
from tests.helpers import training

pytestmark = [pytest.mark.dist, pytest.mark.timeout(180)]
STEPS = 3
NAMES = ["animal", "motion", "none"]
NUM_EVAL = 11  # texts, in micro-batches of which the last window is filled


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classes")
    training.write_model(folder / "model")
    training.write_model(folder / "moe", "qwen3_moe", output_router_logits=True)
    training.write_model(folder / "weights")
    config = AutoConfig.from_pretrained(folder / "weights")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "weights")
    for name, number in (("train", 40), ("eval", NUM_EVAL)):
        write_texts(folder / f"{name}.jsonl", number)
    return folder


def write_texts(file: Path, number: int) -> None:
    """Texts of very different lengths; the class is what their last word is."""
    draw = random.Random(number)
    kinds = {"animal": ("fox", "dog"), "motion": ("jumps", "runs"), "none": ("the", "a", "and")}
    with file.open("w") as lines:
        for index in range(number):
            name = NAMES[index % 3]
            words = [*draw.choices(training.WORDS, k=draw.randint(0, 30)), draw.choice(kinds[name])]
            label = name if index % 2 else NAMES.index(name)
            lines.write(json.dumps({"text": " ".join(words), "label": label}) + "\n")


def run(folder: Path, name: str, over: dict[str, Any]) -> dict[str, Any]:
    """Train on this rank of however many there are."""
    settings = {"global_batch_size": 4, "max_steps": STEPS, "eval_steps": STEPS, **over}
    model, lora = settings.pop("model", "model"), settings.pop("lora", LoraArguments())
    weights = str(folder / "weights") if lora.enable or settings.pop("loads", False) else None
    log, module = training.train(
        folder,
        training.arguments(folder / name, **settings),
        module_class=ClassificationModule,
        model={
            "config_path": str(folder / model),
            "model_path": weights,
            "label_names": NAMES,
            "lora": lora,
        },
        data={"data_type": "classification", "eval_path": str(folder / "eval.jsonl")},
        callbacks=(ConfusionTable(),),
    )
    assert isinstance(module, ClassificationModule)
    assert module.eval_confusion is not None
    return {
        "steps": log.results,
        "eval": module.eval_result,
        "confusion": module.eval_confusion.counts,
        "first": {n: t for n, t in log.first_weights.items() if n.startswith("score.")},
        "weights": training.weights_of(module),
    }


def run_all(folder: Path, cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: run(folder, name, over) for name, over in cases.items()}


LORA: dict[str, Any] = {"lora": LoraArguments(enable=True, rank=4)}
ONE: dict[str, dict[str, Any]] = {
    "alone": {},
    "moe": {"model": "moe"},
    "adapters": LORA,
}
TWO: dict[str, dict[str, Any]] = {
    "data": {},
    "ddp": {"fsdp": {"fsdp_mode": "ddp"}},
    "ulysses": {"accelerator": {"ulysses_size": 2}},
    "context": {"accelerator": {"cp_size": 2}},
    "tensor": {"accelerator": {"tp_size": 2}},
    "pipeline": {"accelerator": {"pp_size": 2}},
    "recomputed": {"recompute": True},
    "adapters, data": LORA | {"recompute": True},
    "adapters, pipeline": LORA | {"accelerator": {"pp_size": 2}},
    "moe, experts spread": {"model": "moe", "accelerator": {"ep_size": 2}},
}


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("1")
    return run_ranks(run_all, 1, folder, ONE, tmp_path=place, timeout_s=170)[0]


@pytest.fixture(scope="module")
def two(folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("2")
    return run_ranks(run_all, 2, folder, TWO, tmp_path=place, timeout_s=170)


def test_it_learns_and_tells_what_it_takes_for_what(alone, folder):
    first, *_, last = alone["alone"]["steps"]
    assert first.losses.keys() == {"class"}
    assert set(first.shown) == {"accuracy"}
    assert last.loss < first.loss
    assert alone["moe"]["steps"][0].losses.keys() == {"class", "balance"}
    found, counts = alone["alone"]["eval"], alone["alone"]["confusion"]
    assert set(found) == {"eval_loss", "eval_accuracy", "eval_f1"}
    assert [sum(row) for row in counts] == [4, 4, 3]
    right = sum(counts[c][c] for c in range(3))
    assert found["eval_accuracy"] == pytest.approx(right / NUM_EVAL, abs=1e-7)
    taken = [sum(row[c] for row in counts) for c in range(3)]
    f1 = [2 * counts[c][c] / (sum(counts[c]) + taken[c]) for c in range(3)]
    assert found["eval_f1"] == pytest.approx(sum(f1) / 3, abs=1e-6)
    lines = [json.loads(line) for line in (folder / "alone/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["eval_confusion"] == counts
    assert "eval_confusion" not in lines[0]
    assert all(0 <= line["accuracy"] <= 1 for line in lines)


@pytest.mark.parametrize("name", TWO)
def test_two_ranks_train_the_steps_of_one(name, alone, two):
    expected = alone[name.split(",")[0] if "," in name else "alone"]
    for rank in two:
        found = rank[name]
        assert len(found["steps"]) == STEPS
        for step, own in zip(found["steps"], expected["steps"], strict=True):
            assert step.losses == pytest.approx(own.losses, rel=1e-5)
            assert step.shown == pytest.approx(own.shown, rel=1e-6)
            assert step.grad_norm == pytest.approx(own.grad_norm, rel=1e-5)
            assert (step.tokens, step.num_tokens) == (own.tokens, own.num_tokens)
        assert found["eval"] == pytest.approx(expected["eval"], rel=1e-5)
        assert found["confusion"] == expected["confusion"]


def test_the_new_head_is_equal_to_the_bit_on_any_mesh(alone, two):
    for name in TWO:
        own = alone[name.split(",")[0] if "," in name else "alone"]["first"]
        assert own
        assert training.is_bit_equal(two[0][name]["first"], own)


def test_beside_adapters_the_head_is_trained_whole(alone):
    trained = alone["adapters"]["weights"]
    assert "score.weight" in trained
    assert not torch.equal(trained["score.weight"], alone["adapters"]["first"]["score.weight"])
    assert all("lora_" in name or name == "score.weight" for name in trained)


def refuse(folder: Path) -> list[str]:
    said: list[str] = []
    bad = folder / "bad.jsonl"
    bad.write_text((folder / "eval.jsonl").read_text() + '{"text": "a fox", "label": "fish"}\n')
    cases: list[tuple[type, dict[str, Any], dict[str, Any]]] = [
        (ClassificationModule, {"label_names": NAMES}, {"eval_path": str(bad)}),
        (ClassificationModule, {"num_labels": 2}, {}),
        (ClassificationModule, {}, {}),
        (ClassificationModule, {"label_names": NAMES}, {"data_type": "plaintext"}),
        (SFTModule, {}, {}),
    ]
    for kind, model, data in cases:
        with pytest.raises((ConfigError, DataError)) as caught:
            training.train(
                folder,
                training.arguments(folder / "refused"),
                module_class=kind,
                model=model,
                data={"data_type": "classification", **data},
            )
        said.append(str(caught.value))
    return said


def test_data_and_model_that_do_not_go_together_stop_all_ranks_before_training(folder, tmp_path):
    for said in run_ranks(refuse, 2, folder, tmp_path=tmp_path):
        assert "bad.jsonl:12: the label is 'fish', none of the model's 3 classes" in said[0]
        assert "train.jsonl:2: the label is 'motion', none of the model's 2 classes" in said[1]
        assert "model.num_labels: neither num_labels nor label_names is given" in said[2]
        assert "data.data_type: plaintext does not go with the model, which has 3" in said[3]
        assert "data.data_type: classification does not go with the model, which has no" in said[4]


def train_and_export(folder: Path, out: Path) -> None:
    _, module = training.train(
        folder,
        training.arguments(out, max_steps=2, global_batch_size=4),
        module_class=ClassificationModule,
        model={"model_path": str(folder / "weights"), "label_names": NAMES},
        data={"data_type": "classification"},
    )
    module.export_weights(out / "export")
    torch.save(training.weights_of(module), out / "weights.pt")


def test_an_export_is_a_classifier_of_transformers_with_its_names(folder, tmp_path):
    run_ranks(train_and_export, 2, folder, tmp_path, tmp_path=tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "export")
    assert type(model).__name__ == "Qwen3ForSequenceClassification"
    assert model.config.id2label == dict(enumerate(NAMES))
    assert model.config.label2id == {name: number for number, name in enumerate(NAMES)}
    trained = torch.load(tmp_path / "weights.pt")
    own = dict(model.named_parameters())
    assert own.keys() == trained.keys()
    assert all(torch.equal(own[name], trained[name]) for name in own)
