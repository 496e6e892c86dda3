"""`data.dataloader`: how samples reach a rank."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DataloaderConfig:
    """How the data loader of one rank works.

    Args:
        type: Kind of loader; `native` is torch's.
        num_workers: Worker processes a rank; 0 loads in the training process.
        prefetch_factor: Batches that each worker prepares ahead; unused without workers.
        drop_last: Leave out the last, incomplete batch of a pass; governs batches without
            `train.dyn_bsz` only.
        pin_memory: Keep batches in page-locked memory for the copy to the accelerator; off, with
            a line in the log, where there is none.
    """

    type: str = "native"
    num_workers: int = 2
    prefetch_factor: int = 2
    drop_last: bool = True
    pin_memory: bool = True


def micro_batch_tokens(micro_batch_size: int, max_seq_len: int, data_type: str) -> int:
    """Tokens that a micro-batch may hold: a preference pair is two sequences of `max_seq_len`."""
    return micro_batch_size * max_seq_len * (2 if data_type == "dpo" else 1)
