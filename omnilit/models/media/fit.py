"""Whether a model can be given images, videos and sounds in packed rows, as it is to be spread."""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Final

from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage] - of any number of dimensions
from transformers import PreTrainedModel

from omnilit.errors import ConfigError
from omnilit.models.media.rope_positions import MODALITY
from omnilit.models.model_mask import sees_ahead, sees_prompts
from omnilit.models.towers import (
    asked_of_features,
    base_of,
    features_name,
    grid_kinds,
    media_kinds,
    source_of_forward,
)

BALANCE: Final = "model.encoder_data_balance"
FIELDS: Final = ("pooler_output", "last_hidden_state")
LOCAL_VIEWS: Final = "num_local_patches"  # how many cut-outs of each image a tower is given


def refuse_unfeedable(model: PreTrainedModel) -> None:
    """Stop before a model whose media do not take the place of tokens.

    Raises:
        ConfigError: With the reason.
    """
    base = base_of(model)
    source = source_of_forward(base)
    reason = ""
    if not media_kinds(model):
        reason = "it has no get_image_features to ask for them"
    elif "masked_scatter" not in source:
        reason = "its media do not take the place of tokens"
    elif sees_prompts(model):
        reason = "all tokens of a prompt see each other, and rows do not say where prompts end"
    elif any(isinstance(module, _BatchNorm) for module in base.modules()):
        reason = "its tower norms what it sees by all images of a row at once"
    if reason:
        raise ConfigError(
            key="model.config_path",
            problem=f"{type(model).__name__} cannot be trained on media in packed rows: {reason}",
            fix="choose another model, or train its text with model.class_path: SFTModule",
        )


def refuse_unbalanced(model: PreTrainedModel) -> None:
    """Stop before a model whose images do not say what they cost.

    Raises:
        ConfigError: With what to do.
    """
    if not grid_kinds(model):
        raise ConfigError(
            key=BALANCE,
            problem=f"{type(model).__name__} has no images or videos whose grids say what each "
            "costs and which features are its own",
            fix="leave it out",
        )


def refuse_split(model: PreTrainedModel) -> None:
    """Stop before a model whose own code says what tokens see, where ranks hold parts of a row.

    Raises:
        ConfigError: With what to do.
    """
    if sees_ahead(model):
        raise ConfigError(
            key="train.accelerator",
            problem=f"tokens of an image see those behind them in {type(model).__name__}, and "
            "ranks that split a row do not know each other's",
            fix="leave ulysses_size and cp_size out",
        )


def refuse_spread(model: PreTrainedModel) -> None:
    """Stop before a model of which more than the towers runs for media, where rows differ by rank.

    Raises:
        ConfigError: With the reason.
    """
    base, taken = base_of(model), inspect.signature(type(model).forward).parameters
    asked = {name for kind in media_kinds(model) for name in asked_of_features(base, kind)}
    reason = ""
    if MODALITY in taken:
        reason = "experts of its own for images run where a row has some"
    elif LOCAL_VIEWS in asked:
        reason = "its tower runs once more where images have local views"
    if reason:
        raise ConfigError(
            key="train.accelerator",
            problem=f"{type(model).__name__} cannot be trained on several ranks with rows of their "
            f"own: {reason}, and ranks would wait for each other",
            fix="train in one process, or share rows among all ranks (ulysses_size, tp_size)",
        )


def feature_fields(known: type[PreTrainedModel], kind: str) -> list[str]:
    """Where a model's own code gives features of one kind, one row a place, the likeliest first.

    Its forward may say it: `self.get_audio_features(...).NAME`, `mm_encoder_outputs["audio"].NAME`.
    """
    forward = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(known.forward))))
    reads = [node for node in ast.walk(forward) if isinstance(node, ast.Attribute)]
    named = [read.attr for read in reads if _is_of(read.value, kind)]
    return [*(name for name in FIELDS if name in named), *FIELDS]


def _is_of(node: ast.expr, kind: str) -> bool:
    if isinstance(node, ast.Call):
        return ast.unparse(node.func) == f"self.{features_name(kind)}"
    return isinstance(node, ast.Subscript) and ast.unparse(node.slice) == repr(kind)
