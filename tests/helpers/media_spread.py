"""Forward and backward of tiny models that see and hear, on as many ranks as there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from omnilit.config import (
    AcceleratorConfig,
    FSDPConfig,
    GradientCheckpointingConfig,
    MixedPrecisionConfig,
    OpsImplementationConfig,
    TrainingArguments,
)
from omnilit.kernels.machine import Machine
from omnilit.models.sequence import layout_of
from omnilit.modules.assembly import AssembledModel, ModelRequest, assemble
from omnilit.parallel.collectives import sum_over
from omnilit.parallel.fsdp import set_gradient_sync
from omnilit.parallel.mesh import ParallelSizes, Topology
from omnilit.parallel.sequence import split_sequence
from omnilit.types import MicroBatch, StepStamp
from tests.helpers.gradients import Deviation, compare
from tests.helpers.media_models import MediaSample, media_config, pack, sample

Result = tuple[float, dict[str, Tensor]]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """A model, how it is spread, and what its rows hold.

    Args:
        family: Of `tests.helpers.media_models`.
        sizes: Fields of `AcceleratorConfig`.
        rows: Of each of the step's rows its samples, as keywords of `sample`.
        train: Further fields of the `train` group.
        is_synced_last: Gradients are exchanged with the step's last micro-batch alone.
        is_ddp: Every rank holds the whole model.
        is_balanced: Data ranks share the work of the vision tower.
    """

    family: str
    sizes: dict[str, Any] = field(default_factory=dict)
    rows: str = "one image"
    train: dict[str, Any] = field(default_factory=dict)
    is_synced_last: bool = False
    is_ddp: bool = False
    is_balanced: bool = False

    def __str__(self) -> str:
        parts = [f"{name} {value}" for name, value in (self.sizes | self.train).items()]
        flags = [n for n in ("is_synced_last", "is_ddp", "is_balanced") if getattr(self, n)]
        return ", ".join([self.family, self.rows, *parts, *flags])


IMAGE: dict[str, Any] = {"images": [(1, 4, 6)]}
VIDEO: dict[str, Any] = {"videos": [(2, 4, 4)]}
SOUND: dict[str, Any] = {"sounds": [113]}
FILM: dict[str, Any] = {"videos": [(2, 4, 4)], "tracks": [118]}
# Rows go to data ranks in turn: of two ranks the first has the even ones
ROWS: dict[str, list[list[dict[str, Any]]]] = {
    "no image": [[{}], [{}], [{}], [{}]],
    "one image": [[{}, IMAGE, {}], [{}], [{}], [{}]],
    "image last": [[{}], [{}], [{}], [{"images": [(1, 4, 4), (1, 8, 4)]}, {}]],
    "all": [[IMAGE, {}, VIDEO], [{**IMAGE, **VIDEO}, IMAGE], [VIDEO], [IMAGE]],
    "uneven": [
        [{"images": [(1, 8, 4), (1, 4, 4), (1, 4, 8)]}, {"videos": [(2, 4, 8)], **IMAGE}],
        [{}],
        [{}, {"images": [(1, 4, 4)]}],
        [{"videos": [(3, 4, 4), (2, 4, 4)]}, {}],
    ],
    "kinds apart": [[IMAGE, {}], [{}, VIDEO], [{}], [{}]],
    "sound apart": [[SOUND, {}], [IMAGE, {}], [{}], [VIDEO, FILM]],
}


def rows_of(case: Case) -> list[MicroBatch]:
    """The rows of a step, whole."""
    found: list[MicroBatch] = []
    for row, samples in enumerate(ROWS[case.rows]):
        made: list[MediaSample] = [
            sample(case.family, 7 + row + 3 * at, seed=10 * row + at, **given)
            for at, given in enumerate(samples)
        ]
        found.append(pack(made, seed=row))
    return found


def run_cases(cases: Sequence[Case]) -> list[Result]:
    """The loss over all ranks and the whole gradients of each case; every rank calls."""
    results = []
    for case in cases:
        try:
            results.append(run_case(case))
        except BaseException as error:
            error.add_note(f"in {case}")
            raise
    return results


def run_case(case: Case) -> Result:
    """One step."""
    assembled, topology = build(case)
    model = assembled.model.train()
    rows, size = rows_of(case), topology.data_size
    count = sum(row.counts["tokens"] for row in rows)
    own = rows[topology.data_rank :: size]
    total = 0.0
    for index, row in enumerate(own):
        stamp = stamp_of(rows[index * size :][:size], {"tokens": count}, index, len(own))
        stamped = replace(row, stamp=stamp)
        is_last = index == len(own) - 1
        set_gradient_sync(model, is_on=is_last or not case.is_synced_last)
        loss = assembled.forward(own_part(assembled, stamped, topology)).token_losses.sum() / count
        loss.backward()
        total += loss.item()
    assembled.verify_step()
    world = dist.group.WORLD
    assert world is not None
    loss = sum_over({"loss": total / topology.tp.size()}, world)["loss"]
    return loss, gathered_gradients(assembled)


def stamp_of(
    rows: Sequence[MicroBatch], counts: dict[str, float], index: int, number: int
) -> StepStamp:
    """What the loader says of the rows that the data ranks have at one place of a step."""
    media = frozenset[str]().union(*(row.modalities for row in rows))
    grids = {kind: [row.grids.get(kind, ()) for row in rows] for kind in media - {"audio"}}
    return StepStamp(counts, 0, index, number, 0.0, media, grids)


def own_part(assembled: AssembledModel, row: MicroBatch, topology: Topology) -> MicroBatch:
    """What the strategy makes of a row for this rank."""
    media = assembled.binding.media
    assert media is not None
    row = media.prepare(row)
    return split_sequence(row, layout_of(topology), topology.sequence_rank)


def build(case: Case) -> tuple[AssembledModel, Topology]:
    """The model on this rank, from random weights that are the same for any layout."""
    fsdp = FSDPConfig(
        fsdp_mode="ddp" if case.is_ddp else "fsdp2",
        mixed_precision=MixedPrecisionConfig(enable=False),
    )
    accelerator = AcceleratorConfig(**case.sizes, fsdp_config=fsdp)
    topology = Topology.build(ParallelSizes.of(accelerator).resolve(dist.get_world_size()), CPU)
    off = GradientCheckpointingConfig(enable=False)
    request = ModelRequest(
        config=media_config(case.family),
        weights_path=None,
        strict=True,
        trust_remote_code=False,
        ops=OpsImplementationConfig(),
        given=frozenset(),
        train=TrainingArguments(**{"gradient_checkpointing": off, **case.train}),
        accelerator=accelerator,
        is_resume=False,
        takes_media=True,
        balances_media=case.is_balanced,
    )
    return assemble(request, topology=topology, machine=Machine("cpu")), topology


def gathered_gradients(assembled: AssembledModel) -> dict[str, Tensor]:
    """The whole gradients of all parameters that have one; every rank calls."""
    found = {}
    for name, parameter in assembled.model.named_parameters():
        if (grad := parameter.grad) is not None:
            whole = grad.full_tensor() if isinstance(grad, DTensor) else grad
            found[name] = whole.detach().clone()
    return found


def check(found: Result, expected: Result) -> Deviation:
    """Check a loss and gradients against those of one process.

    What one process has no gradient for has none here, or a gradient of zero.
    """
    assert abs(found[0] - expected[0]) <= 1e-5 * abs(expected[0])
    more = {n: g for n, g in found[1].items() if n not in expected[1]}
    assert all(not gradient.any() for gradient in more.values()), sorted(more)
    mine = {n: g for n, g in found[1].items() if n not in more}
    return compare(_seen(mine), _seen(expected[1]))


def _seen(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without those that are rounding alone: softmax does not see what all keys share."""
    return {name: g for name, g in gradients.items() if not name.endswith("k_proj.bias")}
