"""Numbers of models against sizes of parallel axes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import transformers as hf

from omnilit.config.parallel_sizes import ParallelSizes
from omnilit.errors import ConfigError
from omnilit.models.fit import ModelNumbers, check_fit, divides_model, fit_problems
from tests.helpers.models import tiny_config

KEY = "train.accelerator"
QWEN = "qwen3"


def sizes(**over: int) -> ParallelSizes:
    return ParallelSizes(**over)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("qwen3", {"experts": 0, "has_ep_plan": False, "is_attention_split": True}),
        ("qwen3_tied", {"is_tied": True}),
        ("qwen3_moe", {"experts": 8, "has_ep_plan": True, "is_attention_split": True}),
        ("gpt_oss", {"experts": 8, "has_ep_plan": True, "is_attention_split": True}),  # our plan
        ("phi3", {"has_tp_plan": True, "is_attention_split": False}),  # its plan gathers heads
        ("deepseek_v3", {"experts": 8, "kv_heads": (4,), "is_attention_split": False}),
    ],
)
def test_numbers_are_those_of_the_configuration(family: str, expected: dict[str, Any]):
    numbers = ModelNumbers.of(tiny_config(family))
    common = {"layers": 2, "heads": (4,), "kv_heads": (2,), "hidden": 64, "vocab": 256}
    found = {name: getattr(numbers, name) for name in (*common, *expected)}
    assert found == common | expected


def test_a_nested_decoder_is_the_one_that_counts():
    text = {"num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 3}
    text |= {"head_dim": 16}
    numbers = ModelNumbers.of(hf.Qwen3VLMoeConfig(text_config={**text, "num_experts": 12}))
    assert (numbers.layers, numbers.heads, numbers.kv_heads, numbers.experts) == (3, (6,), (3,), 12)
    assert numbers.model_type == "qwen3_vl_moe_text"


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (hf.Gemma3nTextConfig, "held against the mean of a whole row"),
        (hf.Gemma4Config, "its code reads a row of the embedding"),
        (hf.Llama4Config, "adds to the output of a split matrix in place"),
    ],
)
def test_a_plan_that_does_not_work_is_refused(config: type[hf.PreTrainedConfig], why: str):
    numbers = ModelNumbers.of(config())
    assert numbers.has_tp_plan
    (problem,) = fit_problems(sizes(tp_size=2), numbers)
    assert problem.key == f"{KEY}.tp_size"
    assert f"the matrices of {numbers.model_type} cannot be split: " in problem.problem
    assert why in problem.problem


def test_layers_may_differ():
    numbers = ModelNumbers.of(hf.Dots3NoteConfig())
    assert numbers.heads == (64, 128)
    assert fit_problems(sizes(ulysses_size=64), numbers) == []
    (problem,) = fit_problems(sizes(ulysses_size=128), numbers)
    assert problem.problem.startswith("ulysses_size 128 does not divide the 64 attention heads")


@pytest.mark.parametrize(
    ("family", "asked", "key", "problem", "fix"),
    [
        (QWEN, {"ulysses_size": 3}, "ulysses_size",
         "ulysses_size 3 does not divide the 4 attention heads of qwen3", "use a divisor: 1, 2, 4"),
        (QWEN, {"ulysses_size": 4, "tp_size": 2}, "ulysses_size",
         "ulysses_size 4 * tp_size 2 = 8 does not divide the 4 attention heads of qwen3",
         "choose ulysses_size * tp_size among 1, 2, 4"),
        (QWEN, {"tp_size": 3}, "tp_size",
         "tp_size 3 does not divide the 4 attention heads of qwen3", "use a divisor: 1, 2, 4"),
        (QWEN, {"tp_size": 4}, "tp_size",
         "tp_size 4 does not divide the 2 key-value heads of qwen3", "use a divisor: 1, 2"),
        (QWEN, {"ep_size": 2}, "ep_size", "qwen3 has no experts to split",
         "leave ep_size out, or train a mixture of experts"),
        ("qwen3_moe", {"ep_size": 3}, "ep_size",
         "ep_size 3 does not divide the 8 experts of qwen3_moe", "use a divisor: 1, 2, 4, 8"),
        (QWEN, {"pp_size": 3}, "pp_size", "3 stages are more than the 2 layers of qwen3",
         "use at most 2"),
        ("qwen3_5", {"cp_size": 3}, "cp_size",
         "cp_size 3 does not divide the 4 value heads of linear attention of qwen3_5_text",
         "use a divisor: 1, 2, 4"),
        ("qwen3_next", {"ulysses_size": 4, "cp_size": 2}, "ulysses_size",
         ("ulysses_size 4 * cp_size 2 = 8 does not divide the 4 value heads of linear attention of "
         "qwen3_next"), "choose ulysses_size * cp_size among 1, 2, 4"),
        ("qwen3_tied", {"pp_size": 2}, "pp_size",
         ("head and embedding of qwen3 are one matrix (tie_word_embeddings), which its first and "
         "its last stage would both train"),
         "leave pp_size out, or train a model whose configuration does not tie them"),
    ],
)  # fmt: skip
def test_what_a_model_cannot_be_divided_into_is_refused(
    family: str, asked: dict[str, int], key: str, problem: str, fix: str
):
    with pytest.raises(ConfigError) as caught:
        check_fit(tiny_config(family), sizes(**asked))
    assert str(caught.value) == f"{KEY}.{key}: {problem}. To fix: {fix}."


def test_experts_without_a_plan_are_refused():
    numbers = replace(ModelNumbers.of(tiny_config("qwen3_moe")), has_ep_plan=False)
    (problem,) = fit_problems(sizes(ep_size=2), numbers)
    assert problem.problem == "transformers does not say how the experts of qwen3_moe are split"


def test_matrices_without_a_plan_are_refused():
    numbers = replace(ModelNumbers.of(tiny_config(QWEN)), has_tp_plan=False)
    (problem,) = fit_problems(sizes(tp_size=2), numbers)
    assert problem.problem == "there is no plan for splitting the matrices of qwen3 (tp_plan)"


def test_a_vocabulary_is_split_evenly():
    numbers = ModelNumbers.of(tiny_config(QWEN, vocab_size=255))
    (problem,) = fit_problems(sizes(tp_size=2), numbers)
    assert problem.problem == "tp_size 2 does not divide the 255 tokens of the vocabulary of qwen3"
    assert problem.fix == "use a divisor: 1, 3, 5, 15, 17, 51, 85, 255"


def test_all_axes_are_told_at_once():
    asked = sizes(ulysses_size=3, tp_size=4, ep_size=2, pp_size=5)
    keys = [problem.key for problem in fit_problems(asked, ModelNumbers.of(tiny_config(QWEN)))]
    assert keys == [f"{KEY}.{name}_size" for name in ("tp", "ulysses", "ep", "pp")]


@pytest.mark.parametrize(
    ("family", "asked"),
    [
        (QWEN, {"ulysses_size": 4}),  # fewer key-value heads than ranks
        (QWEN, {"ulysses_size": 2, "tp_size": 2}),
        (QWEN, {"pp_size": 2, "tp_size": 2}),
        (QWEN, {"cp_size": 8}),
        ("qwen3_moe", {"ep_size": 8}),
        ("qwen3_5", {"ulysses_size": 2, "cp_size": 2}),  # fewer key heads than ranks
        ("qwen3_tied", {"tp_size": 2}),
        ("deepseek_v3", {"tp_size": 8, "ulysses_size": 4}),  # its plan leaves attention whole
    ],
)
def test_what_a_model_can_be_divided_into_passes(family: str, asked: dict[str, int]):
    assert fit_problems(sizes(**asked), ModelNumbers.of(tiny_config(family))) == []


def test_data_parallelism_asks_nothing_of_a_model():
    assert not divides_model(sizes(dp_shard_size=8, dp_replicate_size=2))
    names = ("tp_size", "ep_size", "pp_size", "ulysses_size", "cp_size")
    assert all(divides_model(sizes(**{name: 2})) for name in names)
