"""What ranks that split each matrix send of every token, read from how the matrices are split."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from omnilit.models.experts import expert_plan
from omnilit.models.tensor_parallel import read_plan


@dataclass(frozen=True, slots=True)
class TokenTraffic:
    """Elements of a token whose parts are gathered from the ranks; a sum over them counts twice.

    Args:
        forward: In a forward pass of all blocks.
        backward: In a backward pass of them.
    """

    forward: int = 0
    backward: int = 0

    def __add__(self, other: TokenTraffic) -> TokenTraffic:
        return TokenTraffic(self.forward + other.forward, self.backward + other.backward)


def token_traffic(model: PreTrainedModel, *, with_experts: bool) -> TokenTraffic:
    """What blocks send, embedding and head aside; norms of heads send a few numbers, left out.

    Args:
        model: Split already or not, on the meta device or real; a whole one or some stages.
        with_experts: Experts are split too; else they are spread, and each rank of these sends
            them its share of the tokens.
    """
    config = model.config.get_text_config(decoder=True)
    hidden, top_k = config.hidden_size, getattr(config, "num_experts_per_tok", None) or 0
    rope = getattr(config, "qk_rope_head_dim", None) or 0
    modules, total = dict(model.named_modules()), TokenTraffic()
    for name, style in read_plan(model, with_experts=with_experts).items():
        module = modules.get(name)
        if isinstance(module, nn.Linear):
            total += _of_linear(module, style)
        elif module is not None and style == "moe_tp_experts":
            total += TokenTraffic(2 * hidden, 2 * (hidden + top_k))
        elif module is not None and style == "all_reduce":
            total += TokenTraffic(2 * hidden)
        if module is not None and style == "mla_kv_a_proj":
            total += TokenTraffic(0, 2 * rope)
    if not with_experts:
        spread = sum(name in modules for name in expert_plan(model)) * hidden
        total += TokenTraffic(spread, spread)
    return total


def _of_linear(module: nn.Linear, style: str) -> TokenTraffic:
    """By columns the input's gradient is a sum over ranks, by rows the output is."""
    wide_in, wide_out = module.in_features, module.out_features
    if style in ("colwise_gather_output", "colwise_rep"):
        return TokenTraffic(wide_out, 2 * wide_in)
    if style in ("colwise", "packed_colwise"):
        return TokenTraffic(0, 2 * wide_in)
    if style in ("rowwise_split_input", "rowwise_rep"):
        return TokenTraffic(2 * wide_out, wide_in)
    if style in ("rowwise", "packed_rowwise"):
        return TokenTraffic(2 * wide_out)
    return TokenTraffic()
