"""What a model tells its attention through a mask, which packed attention does not get."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

from torch import nn

CHUNKED: Final = "chunked_attention"
_SLIDING: Final = "sliding_attention"
_SLIDING_MASK: Final = "create_sliding_window_causal_mask"
_WINDOW: Final = "sliding_window"


@dataclass(frozen=True, slots=True)
class LayerMask:
    """What the tokens of a layer see of their sequence, where only a mask would say it.

    Args:
        window: Keys that a query sees at most, itself included; None for all.
        chunk: Tokens of the parts of a sequence that see nothing of each other; None for one part.
    """

    window: int | None = None
    chunk: int | None = None

    @classmethod
    def of(cls, module: nn.Module) -> LayerMask | None:
        """Read it from the configuration, as the model's own code makes its masks from that.

        Args:
            module: Calls transformers' attention interface.

        Returns:
            None where the layers differ and the module does not say which one it is.
        """
        config: Any = getattr(module, "config", None)
        kinds: Sequence[str] | None = getattr(config, "layer_types", None)
        source = inspect.getsource(inspect.unwrap(type(module).forward))
        builders = vars(inspect.getmodule(type(module)))
        has_window = _WINDOW not in source and _SLIDING_MASK in builders
        window = getattr(config, _WINDOW, None) or None if has_window else None
        if kinds is None or not (window or CHUNKED in kinds):
            return cls(window)
        index: int | None = getattr(module, "layer_idx", None)
        if index is None:
            return None
        is_chunked = kinds[index] == CHUNKED
        return cls(
            window if kinds[index] == _SLIDING else None,
            config.attention_chunk_size if is_chunked else None,
        )

    def part(self, bounds: Sequence[int]) -> Sequence[int]:
        """The bounds of what sees each other, from those of the sequences."""
        if self.chunk is None:
            return bounds
        starts = [start for a, b in pairwise(bounds) for start in range(a, b, self.chunk)]
        return [*starts, bounds[-1]]
