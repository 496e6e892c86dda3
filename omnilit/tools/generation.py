"""Completions of several prompts at a time, each as it would be alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from omnilit.config import InferArguments

# Mixed with the number of a prompt to give its own seed; any odd number does
_STRIDE: Final = 0x9E3779B97F4A7C15


@dataclass(slots=True)
class Completion:
    """What a model went on with.

    Args:
        tokens: Without the one that ended it.
        logprobs: The log-probability of each under the model itself, before temperature and
            `top_p`.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class Sampler:
    """Chooses tokens as `infer.*` says; each row has random numbers of its own.

    So a completion does not depend on which prompts ran beside it, but for what rounding does.

    Args:
        arguments: How tokens are chosen.
    """

    def __init__(self, arguments: InferArguments) -> None:
        self.seed = arguments.seed
        self.is_greedy = not arguments.do_sample or arguments.temperature == 0
        self.warpers = []
        if not self.is_greedy and arguments.temperature != 1.0:
            self.warpers.append(TemperatureLogitsWarper(arguments.temperature))
        if not self.is_greedy and arguments.top_p < 1.0:
            self.warpers.append(TopPLogitsWarper(arguments.top_p))

    def generator(self, number: int) -> torch.Generator:
        """The random numbers of the prompt with this number."""
        mixed = (self.seed + _STRIDE * (number + 1)) % 2**63
        return torch.Generator().manual_seed(mixed)

    def choose(self, logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """The next token of each row, int64 [B].

        Args:
            logits: Of the next token, float32 [B, V].
            generators: Of the rows.
        """
        if self.is_greedy:
            return logits.argmax(-1)
        warped: Any = logits
        for warper in self.warpers:
            warped = warper(None, warped)
        chances = warped.softmax(-1).cpu()
        drawn = [
            torch.multinomial(row, 1, generator=one)
            for row, one in zip(chances, generators, strict=True)
        ]
        return torch.cat(drawn).to(logits.device)


@torch.inference_mode()
def complete(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    numbers: Sequence[int],
    sampler: Sampler,
    *,
    max_new_tokens: int,
    stop: Collection[int],
) -> list[Completion]:
    """Go on from prompts of one length, so that none is padded.

    Args:
        model: In evaluation mode.
        prompts: Token ids, all as long.
        numbers: Of the prompts, from which their random numbers come.
        sampler: How tokens are chosen.
        max_new_tokens: Of each row.
        stop: Tokens that end a completion.

    Returns:
        One a prompt, in their order.
    """
    device = model.device
    done = [Completion() for _ in prompts]
    rows = list(range(len(prompts)))  # those that go on, as the cache has them
    generators = [sampler.generator(number) for number in numbers]
    tokens = torch.tensor([list(prompt) for prompt in prompts], device=device)
    cache: Any = None
    for _ in range(max_new_tokens):
        output: Any = model(input_ids=tokens, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits = output.logits[:, -1].float()
        chosen = sampler.choose(logits, [generators[row] for row in rows])
        logprobs = logits.log_softmax(-1).gather(-1, chosen[:, None])[:, 0]
        going: list[int] = []
        found = zip(rows, chosen.tolist(), logprobs.tolist(), strict=True)
        for place, (row, token, logprob) in enumerate(found):
            if token in stop:
                continue
            done[row].tokens.append(token)
            done[row].logprobs.append(logprob)
            going.append(place)
        if not going:
            break
        if len(going) < len(rows):
            kept = torch.tensor(going, device=device)
            cache.batch_select_indices(kept)
            chosen = chosen[kept]
            rows = [rows[place] for place in going]
        tokens = chosen[:, None]
    return done


@torch.inference_mode()
def complete_seeing(
    model: PreTrainedModel,
    prompt: Sequence[int],
    seen: Mapping[str, Any],
    number: int,
    sampler: Sampler,
    *,
    max_new_tokens: int,
    stop: Collection[int],
) -> Completion:
    """Go on from one prompt with media; transformers' own generation counts its positions.

    Args:
        model: In evaluation mode.
        prompt: Token ids.
        seen: What the model takes beside them, on its device.
        number: Of the prompt, from which its random numbers come.
        sampler: How tokens are chosen.
        max_new_tokens: At most.
        stop: Tokens that end the completion.
    """
    tokens = torch.tensor([list(prompt)], device=model.device)
    chooser = _Chooser(sampler, sampler.generator(number))
    generate: Any = model.generate
    generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        generation_config=GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(stop) or None,
            pad_token_id=min(stop, default=0),
        ),
        logits_processor=[chooser],
        **seen,
    )
    found = chooser.found
    if found.tokens and found.tokens[-1] in stop:
        return Completion(found.tokens[:-1], found.logprobs[:-1])
    return found


class _Chooser(LogitsProcessor):
    """Leaves transformers one token to take: the one that our sampler has chosen."""

    def __init__(self, sampler: Sampler, generator: torch.Generator) -> None:
        self.sampler, self.generator, self.found = sampler, generator, Completion()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002 - its protocol
        """The scores of the next token [1, V], those of all others as low as can be."""
        logits = scores.float()
        chosen = self.sampler.choose(logits, [self.generator])
        self.found.tokens.append(int(chosen))
        self.found.logprobs.append(float(logits.log_softmax(-1)[0, chosen]))
        return torch.full_like(scores, -torch.inf).index_fill(-1, chosen, 0.0)
