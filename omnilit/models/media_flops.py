"""What the images and videos of a row cost the tower that looks at them."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from omnilit.models.flops import TowerFlops, count_tower_flops
from omnilit.models.towers import base_of, media_kinds
from omnilit.types import MicroBatch


@dataclass(frozen=True, slots=True)
class MediaFlops:
    """The cost of a model's towers, where it is known.

    Args:
        vision: Of the vision tower; None for one whose patches see less or more than their frame.
        is_frozen: It is not trained.
    """

    vision: TowerFlops | None
    is_frozen: bool

    @classmethod
    def of(cls, model: PreTrainedModel, *, is_frozen: bool) -> MediaFlops:
        """Count them, before anything is bound or sharded.

        Args:
            model: Whole; the meta device will do.
            is_frozen: The vision tower is not trained.
        """
        base = base_of(model)
        if not media_kinds(model) & {"image", "video"}:
            return cls(None, is_frozen)
        tower: PreTrainedModel = base.get_encoder("image")
        has_grids = hasattr(tower.config, "spatial_merge_size")
        has_windows = getattr(tower.config, "window_size", None) is not None
        is_known = has_grids and not has_windows
        return cls(count_tower_flops(tower) if is_known else None, is_frozen)

    def of_batch(self, batch: MicroBatch) -> float | None:
        """Operations of training on the media of a micro-batch; None where they are not known.

        They count where their row is, an even share on each rank of it, whoever looks at them.
        """
        if not batch.modalities:
            return 0.0
        if self.vision is None or "audio" in batch.modalities:
            return None
        grids = [grid for found in batch.grids.values() for grid in found]
        vision, is_frozen = self.vision, self.is_frozen
        cost = vision.forward_of_images(grids) if is_frozen else vision.of_images(grids)
        return cost / batch.num_parts
