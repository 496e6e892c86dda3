"""The ranks that share the work of towers, and what they send each other."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from omnilit.models.media.routes import Seat
from omnilit.models.sequence import layout_of
from omnilit.parallel.mesh import Topology
from omnilit.parallel.rows import trade_rows
from omnilit.parallel.sequence import SequenceLayout
from omnilit.types import MediaRoute


@dataclass(frozen=True, slots=True)
class MediaRanks:
    """Who shares a row and the work of looking at it, and who shares that with other rows.

    Args:
        layout: Which tokens of a row each rank holds.
        sequence: The ranks that share a row; None where it is whole.
        sequence_rank: This rank's place among them.
        data: The ranks with other rows that share the work; None where each looks at its own.
        data_rank: This rank's place among them.
    """

    layout: SequenceLayout = field(default_factory=SequenceLayout)
    sequence: ProcessGroup | None = None
    sequence_rank: int = 0
    data: ProcessGroup | None = None
    data_rank: int = 0

    @classmethod
    def of(cls, topology: Topology, *, is_balanced: bool) -> MediaRanks:
        """Find them.

        Args:
            topology: The meshes of the run.
            is_balanced: Data ranks share the work.
        """
        return cls(
            layout=layout_of(topology),
            sequence=topology.sequence_group,
            sequence_rank=topology.sequence_rank,
            data=topology.data.get_group() if is_balanced and topology.data_size > 1 else None,
            data_rank=topology.data_rank,
        )

    @property
    def is_split(self) -> bool:
        """Whether several ranks share a row."""
        return self.sequence is not None

    @property
    def are_several(self) -> bool:
        """Whether there is anybody to share with."""
        return self.is_split or self.data is not None

    def seat(self, *, is_alone: bool) -> Seat:
        """This rank's place.

        Args:
            is_alone: Its row shares with no other.
        """
        row = 0 if is_alone else self.data_rank
        return Seat(row, self.sequence_rank, self.layout.num_parts)

    def bring_pixels(self, pixels: Tensor, route: MediaRoute) -> Tensor:
        """The pixels of what is looked at here; all data ranks call.

        Args:
            pixels: What this rank sends, [patches, values].
            route: Of this kind of media.
        """
        if route.pixels is None:
            return pixels
        assert self.data is not None
        return trade_rows(pixels, route.pixels, self.data)

    def bring_features(self, levels: list[Tensor], route: MediaRoute) -> list[Tensor]:
        """The features of this rank's tokens, in their order; all ranks call.

        Args:
            levels: Of what was looked at here, each [features, H] with H of its own.
            route: Of this kind of media.
        """
        if route.features is None and route.spread is None:
            return [level[route.order] for level in levels]
        rows = torch.cat(levels, dim=-1)
        if route.features is not None:
            assert self.data is not None
            rows = trade_rows(rows, route.features, self.data)
        rows = rows[route.order]
        if route.spread is not None:
            assert self.sequence is not None
            rows = trade_rows(rows, route.spread, self.sequence)[route.own]
        return [part.clone() for part in rows.split([x.shape[-1] for x in levels], dim=-1)]
