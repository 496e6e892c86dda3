"""What is refused before a model is cut into the stages of a pipeline."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor, nn

from omnilit.config import AcceleratorConfig
from omnilit.errors import ConfigError
from omnilit.modules.pipelined import cut_into_parts
from tests.helpers.models import tiny


def test_a_model_that_stages_would_change_is_refused_where_it_is_cut():
    model = tiny("qwen3")

    def scale(_: nn.Module, args: tuple[()], kwargs: dict[str, Tensor]):
        return args, {**kwargs, "inputs_embeds": kwargs["inputs_embeds"] * 12.0}

    model.model.register_forward_pre_hook(scale, with_kwargs=True)
    topology: Any = SimpleNamespace(sizes=SimpleNamespace(pp_size=2), pp_rank=0)
    with pytest.raises(ConfigError, match="changes what one layer hands to the next"):
        cut_into_parts(model, topology, AcceleratorConfig(pp_size=2))
