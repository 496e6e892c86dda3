"""Matrices split over ranks, beside one process: losses and the gradient of every parameter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from omnilit.config import OpsImplementationConfig
from omnilit.kernels.slots import MOE, ROTARY, SWIGLU
from omnilit.models import tensor_parallel
from omnilit.parallel import vocabulary
from omnilit.parallel.fsdp import set_gradient_sync
from omnilit.parallel.grad_norm import total_norm
from omnilit.testing import run_ranks
from tests.helpers.gradients import compare, gradients_of
from tests.helpers.models import packed_batch, reference_loss, tiny
from tests.helpers.spread import spread, topology_of

pytestmark = pytest.mark.dist
FAMILIES = (
    "llama",
    "qwen2",
    "qwen3",
    "qwen3_tied",
    "gemma2",
    "gemma3",
    "phi",  # its head has a bias
    "phi3",
    "gpt_oss",
    "qwen3_moe",
    "deepseek_v2",
    "deepseek_v3",
)
# Two micro-batches for each of two data ranks; the last one has nothing to learn from
LENGTHS = ((9, 20, 3), (5, 27), (16, 2), (8, 7))
TP, RTOL = {"tp_size": 2}, 1e-5


@dataclass(frozen=True)
class Result:
    loss: float
    norm: float
    gradients: dict[str, Tensor]


def micro_batches():
    batches = [packed_batch(lengths, seed=i) for i, lengths in enumerate(LENGTHS)]
    # the padding token, whose row learns nothing, and the first and last tokens of a rank's part
    batches[0].input_ids[0, :4] = torch.tensor([128, 0, 127, 255])
    batches[-1] = packed_batch(LENGTHS[-1], keep=0.0)
    return batches, sum(batch.counts["tokens"] for batch in batches)


def result_of(model, loss):
    norm = total_norm(model.parameters()).item()
    return Result(loss.item(), norm, gradients_of(model))


def train_alone(family):
    model, (batches, tokens) = tiny(family), micro_batches()
    losses = [reference_loss(model, batch) * batch.counts["tokens"] / tokens for batch in batches]
    loss = torch.stack(losses).sum()
    loss.backward()
    return result_of(model, loss)


def train_split(family, options=None, **sizes):
    topology, model = topology_of(**sizes), tiny(family)
    binding = spread(model, topology, **(options or {}))
    batches, tokens = micro_batches()
    own = batches[topology.data_rank :: topology.data_size]
    total = torch.zeros(())
    for place, batch in enumerate(own):
        set_gradient_sync(model, is_on=place == len(own) - 1)
        loss = binding.head.forward(model, batch).token_losses.sum() / tokens
        loss.backward()
        total += loss.detach()
    binding.verify_called()
    dist.all_reduce(total, group=topology.loss.get_group())
    return result_of(model, total)


def train_cases(cases):
    return [train_split(family, options, **sizes) for family, options, sizes in cases]


def check(cases, num_ranks, tmp_path):
    results = run_ranks(train_cases, num_ranks, cases, tmp_path=tmp_path)
    for case, (family, *_) in enumerate(cases):
        expected = train_alone(family)
        for found in (rank[case] for rank in results):
            compare(found.gradients, expected.gradients, RTOL)
            assert found.loss == pytest.approx(expected.loss, rel=1e-6), cases[case]
            assert found.norm == pytest.approx(expected.norm, rel=1e-6), cases[case]


@pytest.mark.parametrize("half", [0, 1])
def test_two_ranks_that_split_every_matrix_equal_one_process(half, tmp_path):
    check([(family, None, TP) for family in FAMILIES[half::2]], 2, tmp_path)


FOUR = (
    ("qwen3", None, TP),
    ("gemma2", None, TP),
    ("gpt_oss", None, TP),
    ("qwen3_moe", None, TP),
    ("qwen3_tied", None, {**TP, "dp_replicate_size": 2}),
    ("qwen3_tied", None, {**TP, "is_ddp": True}),
    ("deepseek_v3", None, {"tp_size": 4}),
    ("qwen3_moe", None, {**TP, "ep_size": 2}),
    ("gpt_oss", None, {**TP, "ep_size": 4}),
)


def test_shards_of_split_matrices_and_accumulated_gradients_equal_one_process(tmp_path):
    check(FOUR, 4, tmp_path)


RECOMPUTED = {"recompute": True}
REENTRANT = {"recompute": True, "reentrant": True}
RECOMPUTE = (
    ("qwen3", RECOMPUTED, TP),
    ("gpt_oss", RECOMPUTED, TP),
    ("qwen3_moe", RECOMPUTED, TP),
    ("qwen3", REENTRANT, TP),
)


def test_recomputed_blocks_that_are_split_equal_one_process(tmp_path):
    check(RECOMPUTE, 2, tmp_path)


def train_with_everything_bound():
    """Kernels of our own in every slot that could otherwise be left to the model's code."""
    SWIGLU.register("ours", "omnilit.kernels.swiglu:eager")
    ROTARY.register("ours", "omnilit.kernels.rope:eager")
    MOE.register("ours", "omnilit.kernels.moe:eager")
    dense: dict[str, Any] = {
        "swiglu_mlp_implementation": "ours",
        "rotary_pos_emb_implementation": "ours",
    }
    experts: dict[str, Any] = {
        "moe_implementation": "ours",
        "rotary_pos_emb_implementation": "ours",
    }
    ops = {"llama": dense, "qwen3_moe": experts}
    return {
        family: train_split(family, {"ops": OpsImplementationConfig(**fields)}, **TP)
        for family, fields in ops.items()
    }


def test_bound_kernels_work_on_the_heads_and_columns_of_a_rank(tmp_path):
    expected = {family: train_alone(family) for family in ("llama", "qwen3_moe")}
    for found in run_ranks(train_with_everything_bound, 2, tmp_path=tmp_path):
        for family, result in expected.items():
            compare(found[family].gradients, result.gradients, RTOL)


def train_in_bfloat16():
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return train_split("qwen3_tied", {"policy": policy}, **TP)


def test_split_matrices_compute_in_bfloat16(tmp_path):
    expected = train_alone("qwen3_tied")
    for found in run_ranks(train_in_bfloat16, 2, tmp_path=tmp_path):
        # bfloat16 rounds to 8 bits, and weights as wide as these add up a few such roundings
        assert found.loss == pytest.approx(expected.loss, rel=2e-2)
        assert found.norm == pytest.approx(expected.norm, rel=5e-2)


def break_on_purpose():
    """The same runs with one sum over ranks left out of each."""
    names = {
        "norms over own heads": (tensor_parallel, "sum_gradients", lambda value, _: value),
        "embeddings": (tensor_parallel, "sum_values", lambda part, _: part),
        "hidden states": (vocabulary.VocabularyShards, "sum", lambda _, grad: grad),
        "logits": (vocabulary.VocabularyShards, "join", lambda _, *both: both),
    }
    found = {}
    for name, (owner, attribute, broken) in names.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, attribute, broken)
            found[name] = train_split("qwen3", **TP)
    return found


def test_a_sum_over_ranks_that_is_left_out_is_seen(tmp_path):
    expected = train_alone("qwen3").gradients
    (found, _) = run_ranks(break_on_purpose, 2, tmp_path=tmp_path)
    assert len(found) == 4
    for result in found.values():
        with pytest.raises(AssertionError, match="tensors are off by over 1e-04"):
            compare(result.gradients, expected)


def sizes_of_parts():
    """What each rank holds of the model, and the logits of a head outside of training."""
    topology, found = topology_of(**TP), {}
    for family in ("qwen3_tied", "gpt_oss", "qwen3_moe"):
        model, whole = tiny(family), tiny(family)
        spread(model, topology)
        sizes = {}
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor)
            sizes[name] = parameter.numel() // parameter.to_local().numel()
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == ("tied" in family)
        ids = torch.arange(120, 136)[None]
        logits = [m.eval()(input_ids=ids, use_cache=False).logits.detach() for m in (model, whole)]
        found[family] = sizes, *logits
    return found


# Plain weights of every rank: norms, routers, and biases that are added to a sum over ranks
WHOLE = (
    "norm.weight",
    "router.weight",
    "router.bias",
    "gate.weight",
    "o_proj.bias",
    "down_proj_bias",
)


def test_every_rank_holds_half_of_each_matrix_and_all_logits_when_asked(tmp_path):
    for found in run_ranks(sizes_of_parts, 2, tmp_path=tmp_path):
        for family, (sizes, logits, expected) in found.items():
            wrong = {n: k for n, k in sizes.items() if k != (1 if n.endswith(WHOLE) else 2)}
            assert not wrong, family
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
