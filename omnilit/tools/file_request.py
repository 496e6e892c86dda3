"""What `infer` is asked to answer of a file; it imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class FileRequest:
    """Records to answer, and where the answers go.

    Args:
        source: A data file, as `data.train_path` takes it.
        output: A JSON Lines file; where it has lines already, they are kept and not made again.
        batch_size: Prompts that run at a time, where so many are of one length.
        has_logprobs: Write the log-probability of each token beside the completion.
    """

    source: str
    output: Path
    batch_size: int = 16
    has_logprobs: bool = False
