"""Whether a model's attention can be spread over ranks in the way that is asked for."""

from __future__ import annotations

from typing import Final

from transformers import PreTrainedConfig

from omnilit.config import AcceleratorConfig
from omnilit.config.parallel_sizes import ACCELERATOR
from omnilit.errors import ConfigError, Problem
from omnilit.models.layer_mask import CHUNKED
from omnilit.models.projections import MODEL_TYPES

# What configurations call the share of attention weights that is dropped
DROPOUTS: Final = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")


def check_sequence_fit(config: PreTrainedConfig, accelerator: AcceleratorConfig) -> None:
    """Refuse a model that does not work so.

    Raises:
        ConfigError: With all problems.
    """
    if problems := sequence_problems(config, accelerator):
        raise ConfigError.of(problems)


def sequence_problems(config: PreTrainedConfig, accelerator: AcceleratorConfig) -> list[Problem]:
    """Why a model's attention cannot be spread so; nothing where it can."""
    text = config.get_text_config(decoder=True)
    found: list[Problem] = []
    if (
        accelerator.ulysses_size > 1
        and accelerator.enable_async
        and text.model_type not in MODEL_TYPES
    ):
        problem = (
            f"the attention of {text.model_type} is not among those whose exchanges are known to "
            f"overlap: {', '.join(MODEL_TYPES)}"
        )
        found.append(Problem(f"{ACCELERATOR}.enable_async", problem, "leave it out"))
    if accelerator.cp_size > 1 and CHUNKED in (getattr(text, "layer_types", None) or ()):
        problem = f"layers of {text.model_type} see their sequence in chunks ({CHUNKED})"
        found.append(Problem(f"{ACCELERATOR}.cp_size", problem, "use ulysses_size instead"))
    dropped = next((name for name in DROPOUTS if getattr(text, name, None)), None)
    if accelerator.cp_size > 1 and accelerator.cp_method == "ring" and dropped:
        problem = f"ring drops no attention weights, and the model has {dropped} "
        problem += str(getattr(text, dropped))
        fix = f"set cp_method: gather, or {dropped}: 0.0 in the model's configuration"
        found.append(Problem(f"{ACCELERATOR}.cp_method", problem, fix))
    return found
