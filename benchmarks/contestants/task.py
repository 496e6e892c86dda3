"""The fine-tune that all contestants do: model, conversations, optimizer, and the measuring."""

from __future__ import annotations

import json
import os
import random
import resource
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3MoeConfig

from benchmarks.workload import SPECIAL, cpu_seconds
from omnilit.data.template_texts import CHATML

STEP_TOKENS: Final = 2048
ROWS_A_STEP: Final = 8  # of trainers that pad: about as many tokens a step
LR: Final = 3e-4
BETAS: Final = (0.9, 0.95)
VOCABULARY: Final = 32_000
MODEL: Final[dict[str, Any]] = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
}
# 4 layers of 16 experts, 4 of which take a token and are together as wide as the dense model's MLP
MOE: Final[dict[str, Any]] = {
    **MODEL,
    "num_hidden_layers": 4,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 384,
    "norm_topk_prob": True,
}
MODELS: Final = {"dense": lambda: Qwen3Config(**MODEL), "moe": lambda: Qwen3MoeConfig(**MOE)}
MEDIAN_TOKENS: Final = 153  # of a conversation
SPREAD: Final = 0.98  # of the logarithms of their lengths
WARM_UP: Final = 3  # steps that are not counted
ORDER: Final = "order.json"  # of records, as one contestant took them; also the variable
STARTED: Final = "BENCH_STARTED"  # when the process was started, in the environment


@dataclass
class Meter:
    """What each step cost; a contestant calls `step` behind each of its optimizer steps."""

    num_steps: int
    times: list[tuple[float, float]] = field(default_factory=list)  # wall and CPU, in seconds
    tokens: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def step(self, num_tokens: int, loss: float) -> None:
        """Note the end of a step that trained so many real tokens."""
        self.times.append((time.time(), cpu_seconds()))
        self.tokens.append(num_tokens)
        self.losses.append(loss)

    def report(self) -> None:
        """Print the figures as one line of JSON."""
        (wall, cpu), (last_wall, last_cpu) = self.times[WARM_UP - 1], self.times[-1]
        thousands = sum(self.tokens[WARM_UP:]) / 1000
        figures = {
            "cpu_s_per_1k": (last_cpu - cpu) / thousands,
            "wall_s_per_1k": (last_wall - wall) / thousands,
            "first_step_s": self.times[0][0] - float(os.environ[STARTED]),
            "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            "tokens_a_step": sum(self.tokens) / len(self.tokens),
            "loss_first": self.losses[0],
            "loss_last": self.losses[-1],
            "losses": self.losses,
        }
        sys.stdout.write("\nRESULT " + json.dumps(figures) + "\n")
        sys.stdout.flush()


def write_task(folder: Path, *, num_records: int, model_name: str) -> None:
    """One of `MODELS` with random weights, tokenizer and conversations."""
    words = _read_corpus()
    tokenizer = _train_tokenizer(words)
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[model_name]())
    model.save_pretrained(folder / "model")
    draw = random.Random(0)
    sample = " ".join(words[:20_000])
    words_a_token = 20_000 / len(tokenizer(sample)["input_ids"])
    with (folder / "data.jsonl").open("w", encoding="utf-8") as lines:
        for _ in range(num_records):
            tokens = min(draw.lognormvariate(0, SPREAD) * MEDIAN_TOKENS, 1800)
            size = max(8, int(tokens * words_a_token))
            start = draw.randrange(len(words) - size)
            asked = max(2, size // 4)
            parts = (words[start : start + asked], words[start + asked : start + size])
            messages = [
                {"role": role, "content": " ".join(part)}
                for role, part in zip(("user", "assistant"), parts, strict=True)
            ]
            lines.write(json.dumps({"messages": messages}) + "\n")


def read_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of `write_task`."""
    return PreTrainedTokenizerFast.from_pretrained(folder / "model")


def read_samples(folder: Path) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels of every conversation, tokenised by plain transformers."""
    tokenizer = read_tokenizer(folder)
    samples = []
    for line in (folder / "data.jsonl").read_text(encoding="utf-8").splitlines():
        encoded = tokenizer.apply_chat_template(
            json.loads(line)["messages"],
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        ids, mask = encoded["input_ids"], encoded["assistant_masks"]
        samples.append((ids, [i if m else -100 for i, m in zip(ids, mask, strict=True)]))
    return samples


def _read_corpus() -> list[str]:
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    return " ".join(file.read_text("utf-8", errors="replace") for file in files).split()


def _train_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL,
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(words)], trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    wrapped.chat_template = CHATML
    return wrapped
