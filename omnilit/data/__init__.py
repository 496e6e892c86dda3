"""From files of text to the packed micro-batches of optimizer steps."""

from omnilit.data.batches import WorkerSettings
from omnilit.data.cache import TokenDataset, open_prepared
from omnilit.data.encode import decode_spans
from omnilit.data.evaluation import EvalLoader
from omnilit.data.packing import PlanSettings
from omnilit.data.prepare import PreparedInfo, PrepareRequest, prepare
from omnilit.data.sources import list_files
from omnilit.data.templates import select_template
from omnilit.data.transforms import TransformSettings, build_transform
from omnilit.data.window import TrainLoader, WindowLayout, steps_per_epoch

__all__ = [
    "EvalLoader",
    "PlanSettings",
    "PrepareRequest",
    "PreparedInfo",
    "TokenDataset",
    "TrainLoader",
    "TransformSettings",
    "WindowLayout",
    "WorkerSettings",
    "build_transform",
    "decode_spans",
    "list_files",
    "open_prepared",
    "prepare",
    "select_template",
    "steps_per_epoch",
]
