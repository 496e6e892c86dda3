"""What watches a run: metrics, progress, evaluation, checkpoints, traces, the first report."""

from omnilit.callbacks.checkpointing import CheckpointSaver
from omnilit.callbacks.confusion import ConfusionTable
from omnilit.callbacks.evaluation import EvaluationSchedule
from omnilit.callbacks.hyperparameters import HyperparameterLog
from omnilit.callbacks.metrics import MetricsRecorder
from omnilit.callbacks.progress import progress_callback
from omnilit.callbacks.samples import EvalSamples
from omnilit.callbacks.selection import chosen_callbacks
from omnilit.callbacks.startup import StartupReport

__all__ = [
    "CheckpointSaver",
    "ConfusionTable",
    "EvalSamples",
    "EvaluationSchedule",
    "HyperparameterLog",
    "MetricsRecorder",
    "StartupReport",
    "chosen_callbacks",
    "progress_callback",
]
