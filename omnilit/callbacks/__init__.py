"""What watches a run: metrics, progress, evaluation, checkpoints, the report at the start."""

from omnilit.callbacks.checkpointing import CheckpointSaver
from omnilit.callbacks.evaluation import EvaluationSchedule
from omnilit.callbacks.metrics import MetricsRecorder
from omnilit.callbacks.progress import progress_callback
from omnilit.callbacks.startup import StartupReport

__all__ = [
    "CheckpointSaver",
    "EvaluationSchedule",
    "MetricsRecorder",
    "StartupReport",
    "progress_callback",
]
