"""Which training runs are the same run: classes of layouts, each held against its first member."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from omnilit.config import AcceleratorConfig, OffloadConfig
from omnilit.config.accelerator import FSDPConfig
from omnilit.config.parallel_sizes import ParallelSizes
from tests.helpers import training
from tests.helpers.layouts import ALONE, DDP, DDP_2, FSDP, HSDP, OTHERS, Layout

RECOMPUTED: dict[str, Any] = {"recompute": True}
OFFLOADED: dict[str, Any] = {"fsdp": {"offload": True}}
ACTIVATIONS: dict[str, Any] = {
    "accelerator": {"offload_config": OffloadConfig(enable_activation=True)}
}


def _axes(name: str, num_ranks: int, **sizes: Any) -> Layout:
    return Layout(name, num_ranks, {"accelerator": sizes})


def _balanced(layout: Layout) -> Layout:
    """The same, where ranks look at each other's images."""
    name = f"{layout.name}, balanced"
    return replace(layout, name=name, model={"encoder_data_balance": True})


DATA = (FSDP, HSDP, DDP_2, *OTHERS)
SEQUENCE = (
    _axes("ulysses 2", 2, ulysses_size=2),
    _axes("ulysses 4", 4, ulysses_size=4),
    _axes("cp 2", 2, cp_size=2),
    _axes("cp 2, ring", 2, cp_size=2, cp_method="ring"),
    _axes("ulysses 2 x cp 2", 4, ulysses_size=2, cp_size=2),
    _axes("ulysses 2 x cp 2, ring", 4, ulysses_size=2, cp_size=2, cp_method="ring"),
    _axes("ulysses 2 x FSDP 2", 4, ulysses_size=2),
    Layout("ulysses 2, DDP", 2, {"accelerator": {"ulysses_size": 2}, **DDP}),
    _axes("ulysses 2, async", 2, ulysses_size=2, enable_async=True),
)
MATRICES = (_axes("tp 2", 2, tp_size=2), _axes("tp 2 x FSDP 2", 4, tp_size=2))
STAGES = (
    _axes("pp 2", 2, pp_size=2),
    _axes("pp 2, GPipe", 2, pp_size=2, pp_schedule="gpipe"),
    _axes("pp 2 x FSDP 2", 4, pp_size=2),
    Layout("pp 2 x DDP 2", 4, {"accelerator": {"pp_size": 2}, **DDP}),
    _axes("pp 2 x ulysses 2", 4, pp_size=2, ulysses_size=2),
    _axes("pp 2 x cp 2, ring", 4, pp_size=2, cp_size=2, cp_method="ring"),
    _axes("pp 2 x tp 2", 4, pp_size=2, tp_size=2),
)
_INTERLEAVED: dict[str, Any] = {"pp_schedule": "interleaved", "pp_stages_per_rank": 2}
DEEP_STAGES = (
    _axes("pp 4", 4, pp_size=4),
    _axes("pp 2, interleaved", 2, pp_size=2, **_INTERLEAVED),
    _axes("pp 2 x FSDP 2, interleaved", 4, pp_size=2, **_INTERLEAVED),
    Layout("pp 2, recomputed", 2, {"accelerator": {"pp_size": 2}, **RECOMPUTED}),
    Layout("pp 2, offloaded", 2, {"accelerator": {"pp_size": 2}, **OFFLOADED}),
    Layout(
        "pp 2, activations offloaded",
        2,
        {"accelerator": {"pp_size": 2, **ACTIVATIONS["accelerator"]}},
    ),
    Layout(
        "pp 2 x FSDP 2, reduced each time",
        4,
        {"accelerator": {"pp_size": 2}, "fsdp": {"sync_each_micro_batch": True}},
    ),
    Layout(
        "pp 2 x FSDP 2, kept gathered",
        4,
        {"accelerator": {"pp_size": 2}, "fsdp": {"reshard_after_backward": False}},
    ),
)
EXPERTS = (
    _axes("ep 2", 2, ep_size=2),
    _axes("ep 2, outside", 2, ep_size=2, ep_outside=True),
    _axes("ep 2 x efsdp 2", 4, ep_size=2),
    _axes("ep 2 x efsdp 2, outside", 4, ep_size=2, ep_outside=True),
    _axes("ep 4", 4, ep_size=4),
    _axes("ep 4, outside", 4, ep_size=4, ep_outside=True),
    _axes("ep 2 x HSDP 2", 4, ep_size=2, dp_replicate_size=2),
    _axes("ep 2 x ulysses 2", 4, ep_size=2, ulysses_size=2),
    _axes("ep 2 x tp 2", 4, ep_size=2, tp_size=2),
    _axes("ep 2 x pp 2", 4, ep_size=2, pp_size=2),
)
MEMORY = (
    Layout("recomputed", 1, RECOMPUTED),
    Layout("recomputed, FSDP 2", 2, RECOMPUTED),
    Layout("offloaded", 1, OFFLOADED),
    Layout("offloaded, FSDP 2", 2, OFFLOADED),
    Layout("activations offloaded", 1, ACTIVATIONS),
    Layout("activations offloaded, FSDP 2", 2, {**ACTIVATIONS, **RECOMPUTED}),
    Layout("reduced each time, FSDP 2", 2, {"fsdp": {"sync_each_micro_batch": True}}),
)
# Without packing a micro-batch of 8 samples holds what 8 of one sample do
PLAIN: dict[str, Any] = {"dyn_bsz": False}
ACCUMULATION = (
    Layout("1 x 8", 1, PLAIN),
    Layout("8 x 1", 1, {**PLAIN, "micro_batch_size": 8}),
    Layout("2 x 4", 1, {**PLAIN, "micro_batch_size": 2}),
    Layout("2 x 2, FSDP 2", 2, {**PLAIN, "micro_batch_size": 2}),
)
_SHARED_DATA = _axes("ulysses 2 x FSDP 2", 4, ulysses_size=2)
_TWO = (FSDP, _axes("ulysses 2", 2, ulysses_size=2), _axes("ep 2", 2, ep_size=2))
SEEING = (
    ALONE,
    *(FSDP, HSDP, DDP_2, Layout("FSDP 4", 4)),
    *map(_balanced, (FSDP, HSDP, DDP_2, Layout("FSDP 4", 4), _SHARED_DATA)),
    *(one for one in SEQUENCE if "async" not in one.name),
    *MATRICES,
    _balanced(_axes("tp 2 x FSDP 2", 4, tp_size=2)),
    replace(_balanced(FSDP), name="FSDP 2, balanced, recomputed", over=RECOMPUTED),
)
SEEING_EXPERTS = (
    *(ALONE, *_TWO, *map(_balanced, _TWO)),
    _balanced(_axes("ep 2 x efsdp 2", 4, ep_size=2)),
    _balanced(_axes("ep 2 x ulysses 2", 4, ep_size=2, ulysses_size=2)),
    _axes("ep 2 x tp 2", 4, ep_size=2, tp_size=2),
)


@dataclass(frozen=True)
class Equivalence:
    """Runs that take the same steps.

    Args:
        name: Of the class, and of the folder of its model.
        model: Arguments of `training.write_model`, or of `write_seeing_model`.
        members: The first is what the others are held against.
        quick: Names of those that every run of the suite takes, the first beside them.
        is_packed: A pass ends in a step that is mostly filling, and a run goes on from another
            member's place in the data.
        is_seeing: The model has a tower, and two of three records have images.
    """

    name: str
    model: dict[str, Any]
    members: tuple[Layout, ...]
    quick: frozenset[str] = field(default_factory=frozenset)
    is_packed: bool = True
    is_seeing: bool = False


_DENSE = (ALONE, *DATA, *SEQUENCE, *MATRICES, *STAGES, *MEMORY)
_MOE = {"family": "qwen3_moe", "output_router_logits": True}
CLASSES = (
    Equivalence(
        "dense",
        {},
        _DENSE,
        frozenset(
            {"recomputed, FSDP 2", "offloaded, FSDP 2", "ulysses 2, DDP", "tp 2", "pp 2"}
            | {"cp 2, ring"}
        ),
    ),
    Equivalence(
        "experts",
        _MOE,
        (*_DENSE, *EXPERTS),
        frozenset(
            {FSDP.name, HSDP.name, "ep 2", "ep 2 x efsdp 2, outside", "ulysses 2", "cp 2"}
            | {"ep 2 x ulysses 2", "ulysses 2 x cp 2", "tp 2 x FSDP 2", "pp 2 x FSDP 2"}
        ),
    ),
    Equivalence(
        "layers",
        {**_MOE, "num_hidden_layers": 4},
        (ALONE, *DEEP_STAGES),
        frozenset({"pp 2, interleaved"}),
    ),
    Equivalence("unpacked", {}, ACCUMULATION, frozenset({"8 x 1"}), is_packed=False),
    Equivalence(
        "images",
        {"name": "qwen3_vl"},
        SEEING,
        frozenset({"ulysses 2 x FSDP 2, balanced"}),
        is_seeing=True,
    ),
    Equivalence(
        "images and experts",
        {"name": "qwen3_vl_moe"},
        SEEING_EXPERTS,
        frozenset({"ep 2, balanced"}),
        is_seeing=True,
    ),
)


def why_left_out(layout: Layout) -> str | None:
    """What this release does not do of a layout; None for nothing."""
    accelerator, fsdp = layout.over.get("accelerator", {}), layout.over.get("fsdp", {})
    unknown = [name for name in accelerator if name not in _names(AcceleratorConfig)]
    unknown += [f"fsdp_config.{name}" for name in fsdp if name not in _names(FSDPConfig)]
    return f"train.accelerator.{unknown[0]} does not exist" if unknown else None


def _names(kind: type) -> set[str]:
    return {entry.name for entry in fields(kind)}


def sizes_of(layout: Layout) -> ParallelSizes:
    """The sizes of a layout that is not left out, as numbers of ranks."""
    accelerator = training.arguments(Path(), **layout.over).accelerator
    return ParallelSizes.of(accelerator).resolve(layout.num_ranks)
