"""Configurations, tokenizers and models on the meta device, from a folder or a hub name."""

from __future__ import annotations

import copy
import json
from contextlib import nullcontext
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

from omnilit.errors import ConfigError, suggest
from omnilit.models.architecture import has_towers, name_of
from omnilit.models.class_labels import CONFIG_KEY, is_classifier
from omnilit.models.gpu_packages import without_fla

TOKENIZER_KEY = "model.tokenizer_path"


def load_model_config(
    config_path: str | None, model_path: str | None, *, trust_remote_code: bool
) -> PreTrainedConfig:
    """Read the configuration that says what the model looks like.

    Args:
        config_path: A folder with a config.json, such a file, or a hub name; default: model_path.
        model_path: Where the weights are, when there are any.
        trust_remote_code: Whether Python code beside the configuration may run.

    Raises:
        ConfigError: Neither path is given, or what is there is no configuration that the
            installed transformers knows.
    """
    path = config_path or model_path
    if path is None:
        raise ConfigError(
            key=CONFIG_KEY,
            problem="neither config_path nor model_path is given",
            fix="give model_path to train existing weights, or config_path to start from scratch",
        )
    key = CONFIG_KEY if config_path else "model.model_path"
    local = Path(path).expanduser()
    if local.exists():
        _check_config_file(local, key, trust_remote_code=trust_remote_code)
        path = str(local)
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except OSError as error:  # transformers' word for: no such folder, no such repository, offline
        where = "cannot be read" if local.exists() else "is no file or folder, nor reachable as hub"
        raise ConfigError(
            key=key,
            problem=f"{path} {where} ({_first_line(error)})",
            fix="give a folder that holds a config.json, that file, or a hub name and a connection",
        ) from error
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:  # bad values
        raise ConfigError(
            key=key,
            problem=f"{path} is refused by transformers ({_first_line(error)})",
            fix="correct the configuration, or set model.trust_remote_code: true if it needs code",
        ) from error


def _check_config_file(path: Path, key: str, *, trust_remote_code: bool) -> None:
    """Refuse what is on disk with better words than a failed download would have."""
    file = path / "config.json" if path.is_dir() else path
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            key=key,
            problem=f"the folder {path} holds no config.json",
            fix="give the folder that holds the model's config.json",
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(
            key=key, problem=f"{file} is not readable JSON ({error})", fix="correct the file"
        ) from error
    model_type = raw.get("model_type") if isinstance(raw, dict) else None
    if model_type is None:
        raise ConfigError(
            key=key, problem=f"{file} names no model_type", fix="add one, such as 'qwen3'"
        )
    has_code = trust_remote_code and "auto_map" in raw
    if model_type not in CONFIG_MAPPING and not has_code:
        raise ConfigError(
            key=key,
            problem=f"transformers does not know the model_type {model_type!r} of {file}."
            f"{suggest(model_type, CONFIG_MAPPING)}",
            fix="correct it, install a newer transformers, or set model.trust_remote_code: true "
            "where the folder brings its own code",
        )


def build_meta(
    config: PreTrainedConfig, *, dtype: torch.dtype, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Build the model that `config` names without any memory for its weights.

    Args:
        config: Not changed: the model gets a deep copy, so two models never share one.
        dtype: Type of the parameters.
        trust_remote_code: Whether Python code beside the configuration may run.

    Raises:
        ConfigError: transformers has no causal language model for this configuration, and it names
            no class that has towers beside one.
    """
    return build_on("meta", config, dtype=dtype, trust_remote_code=trust_remote_code)


def build_on(
    device: str,
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Build the model that `config` names with memory of its own, but no values yet.

    Args:
        device: Where, as torch names it.
        config: Not changed: the model gets a deep copy, so two models never share one.
        dtype: Type of the parameters.
        trust_remote_code: Whether Python code beside the configuration may run.

    Raises:
        ConfigError: transformers has no causal language model for this configuration, and it names
            no class that has towers beside one.
    """
    with without_fla():
        return _build(device, config, dtype=dtype, trust_remote_code=trust_remote_code)


def _build(
    device: str, config: PreTrainedConfig, *, dtype: torch.dtype, trust_remote_code: bool
) -> PreTrainedModel:
    kind = AutoModelForImageTextToText if has_towers(config) else AutoModelForCausalLM
    has_code = trust_remote_code and "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    if is_classifier(config):
        kind = AutoModelForSequenceClassification
    is_language_model = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or has_code
    if kind is AutoModelForCausalLM and not is_language_model:
        raise ConfigError(
            key=CONFIG_KEY,
            problem=f"{name_of(config)} is not a causal language model",
            fix="choose a model whose architecture ends in ForCausalLM, or train one that takes "
            "images beside text with model.class_path: VLMModule",
        )
    # values that would be overwritten are not drawn; on meta transformers draws none anyway
    with torch.device(device), nullcontext() if device == "meta" else no_init_weights():
        model = kind.from_config(
            copy.deepcopy(config), dtype=dtype, trust_remote_code=trust_remote_code
        )
    model.tie_weights(recompute_mapping=False)  # what transformers does once it has drawn values
    return model


def load_tokenizer(path: str, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Load a tokenizer that pads on the right, as training wants it.

    Raises:
        ConfigError: There is none at `path`.
    """
    local = Path(path).expanduser()
    fix = "give a folder that holds tokenizer.json or another tokenizer of transformers"
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(local) if local.exists() else path,
            padding_side="right",
            trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ConfigError(
            key=TOKENIZER_KEY,
            problem=f"no tokenizer can be loaded from {path} ({_first_line(error)})",
            fix=fix,
        ) from error
    # without any file transformers makes one from the model's type, with nothing to read text with
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ConfigError(
            key=TOKENIZER_KEY, problem=f"{path} holds no vocabulary of a tokenizer", fix=fix
        )
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Refuse a tokenizer whose tokens the model has no embeddings for; a smaller one is normal.

    Raises:
        ConfigError: It has more tokens than the model's vocabulary.
    """
    num_tokens, vocab_size = len(tokenizer), config.get_text_config().vocab_size
    if num_tokens > vocab_size:
        raise ConfigError(
            key=TOKENIZER_KEY,
            problem=f"the tokenizer has {num_tokens} tokens, the model's vocabulary {vocab_size}",
            fix="use the tokenizer that belongs to the model, or raise vocab_size in the "
            "configuration of a model that is trained from scratch",
        )


def folder_beside(config_path: str | None) -> str | None:
    """Where a tokenizer lies by default: beside the configuration, be that a folder or a file."""
    if config_path is None or not Path(config_path).expanduser().is_file():
        return config_path
    return str(Path(config_path).parent)


def _first_line(error: BaseException) -> str:
    lines = (str(error).strip() or type(error).__name__).splitlines()
    text = lines[0]
    if text.endswith(":") and len(lines) > 1:  # the cause stands on the second line
        text = f"{text} {lines[1].strip()}"
    return text.rstrip(".")


def stop_tokens(
    generation: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """All ids that end an answer: the model's own, one or several, and the tokenizer's."""
    named = getattr(generation, "eos_token_id", None)
    ids = named if isinstance(named, list) else [named]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if isinstance(i, int)})


def load_generation_config(model_path: str | None) -> GenerationConfig | None:
    """How the model that training starts from wants to be sampled; None where it does not say."""
    if model_path is None:
        return None
    try:
        return GenerationConfig.from_pretrained(Path(model_path).expanduser())
    except OSError:  # transformers' word for: there is no such file
        return None
