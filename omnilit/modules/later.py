"""Tasks whose arguments are settled and whose training comes with a later release."""

from __future__ import annotations

from typing import Any, NoReturn

from omnilit.errors import ConfigError
from omnilit.modules.base import OmniModule


def _refuse(module: OmniModule) -> NoReturn:
    raise ConfigError(
        key="model.class_path",
        problem=f"{type(module).__name__} is not available yet",
        fix="use SFTModule, or wait for the release that brings this task",
    )


class OmniComposedModule(OmniModule):
    """Encoders, a foundation model and decoders in one; not available yet.

    Args:
        kwargs: The arguments of `OmniModule`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _refuse(self)


class DiffusionModule(OmniModule):
    """Diffusion transformers; not available yet.

    Args:
        kwargs: The arguments of `OmniModule`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _refuse(self)
