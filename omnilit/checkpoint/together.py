"""Work with files that several ranks do, or wait for, without one of them failing alone."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Final, TypeVar

import torch.distributed as dist
import yaml
from torch.distributed import ProcessGroup

from omnilit.errors import CheckpointError, OmniError
from omnilit.parallel.collectives import is_distributed, raise_together

T = TypeVar("T")

# Whatever is caught here is raised again, so wide is right: what is not caught on one rank leaves
# the others in a collective until its timeout. Writing calls code that is not ours: transformers'
# `save_pretrained` (ValueError, ImportError, ...), yaml's representers, pickle on the state of any
# callback (AttributeError, TypeError, PicklingError), torch (RuntimeError).
FAILURES: Final = (
    OmniError,
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    RuntimeError,
    ImportError,
    pickle.PickleError,
    yaml.YAMLError,
)


def run_together(
    action: Callable[[], T],
    *,
    name: str,
    on_first: bool = False,
    group: ProcessGroup | None = None,
) -> T | None:
    """Do something on every rank, or on the first only, and fail on all where one fails.

    Args:
        action: Reads or writes files; holds no collective that another rank may miss by failing.
        name: What is being done, for the message of an error of the file system.
        on_first: Only rank 0 acts; the others wait for its outcome.
        group: All ranks, for a thread beside the one that trains; default: the default group.

    Returns:
        What `action` returned, None on a rank that did not act.

    Raises:
        CheckpointError: Of the file system: disk full, no permission, gone; on every rank.
        OmniError: Another one of `action`, or the name of what a rank raised that is no
            `OmniError`; that rank itself raises it as it is.
    """
    result: T | None = None
    error: BaseException | None = None
    if not on_first or not is_distributed() or dist.get_rank() == 0:
        try:
            result = action()
        except OSError as caught:
            where = f" ({caught.filename})" if caught.filename else ""
            error = CheckpointError(f"{name} failed: {caught.strerror or caught}{where}")
            error.__cause__ = caught
        except FAILURES as caught:
            error = caught
    raise_together(error, group)
    return result
