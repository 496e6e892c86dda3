"""`train.checkpoint`: what is written, when, and where a run goes on from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving, resuming and exporting.

    Args:
        output_dir: Folder of the run: configuration, metrics, checkpoints.
        manager: Format of the checkpoints; `dcp` is torch's distributed checkpoint.
        save_async: Write checkpoints in the background, from a copy in memory, one at a time.
        load_path: Checkpoint to resume from; `auto` takes the newest complete one in
            `output_dir`, null starts anew.
        save_steps: Steps between two checkpoints; 0 saves at no step.
        save_epochs: Epochs between two checkpoints; 0 saves at the end of no epoch.
        hf_save_steps: Steps between two exports in the Hugging Face layout; 0 for none.
        hf_save_epochs: Epochs between two exports in the Hugging Face layout; 0 for none.
        save_hf_weights: Export the last weights in the Hugging Face layout; false turns all
            exports off.
        keep_last: Checkpoints that are kept, the newest ones; null keeps all. Exports stay.
        export_dtype: Dtype of exported weights: `float32`, `bfloat16`, `float16`; `auto` is that
            of the loaded model's own configuration, else `mixed_precision.master_dtype`.
        overwrite: Let a new run start in an `output_dir` that holds another run's checkpoints.
    """

    output_dir: str = "output"
    manager: str = "dcp"
    save_async: bool = False
    load_path: str | None = None
    save_steps: int = 0
    save_epochs: int = 1
    hf_save_steps: int = 0
    hf_save_epochs: int = 0
    save_hf_weights: bool = True
    keep_last: int | None = None
    export_dtype: str = "auto"
    overwrite: bool = False
