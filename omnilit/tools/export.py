"""`omnilit export`: a Hugging Face folder of a checkpoint."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

from typing_extensions import override

from omnilit.checkpoint.layout import (
    CHECKPOINTS,
    HF_FOLDER,
    MODEL_ASSETS,
    checkpoints_folder,
    find_latest,
    is_export_only,
)
from omnilit.checkpoint.manifest import find_damage
from omnilit.config.ranges import EXPORT_DTYPES
from omnilit.errors import ConfigError, Problem
from omnilit.plugins import import_modules

CHECKPOINT_KEY: Final = "CHECKPOINT"
OUT_KEY: Final = "OUT"
USAGE: Final = f"""\
usage: omnilit export CHECKPOINT OUT [--dtype TYPE] [--assets DIR] [--merge] [--base DIR]
                      [--overwrite]

Writes the weights of a checkpoint, with tokenizer and configuration, as a folder that transformers
loads: the same as the run's own export at that step. One process does it, whatever the number of
processes that saved. Of a run with model.lora that are its adapters, as a folder that peft loads.

  CHECKPOINT           a global_step_N folder, or a run's output folder: its newest good checkpoint
  OUT                  the folder to write; it must not exist, or be empty
  --dtype TYPE         one of {", ".join(EXPORT_DTYPES)}; auto, the default, is what the run's
                       train.checkpoint.export_dtype came to
  --assets DIR         where the model's config.json and tokenizer are, if not in the model_assets
                       of the run that CHECKPOINT lies in: for a checkpoint that was moved, or saved
                       from Python
  --merge              of adapters: write the whole model, with them added to its matrices
  --base DIR           where the model is that the adapters were trained beside, if not where it was
  --overwrite          replace OUT, whatever is in it
  --trust_remote_code  run Python code that lies in DIR
  --imports NAME ...   modules of your own to import first, for a model that one of them registers;
                       those that the run imported are not imported again without being named
"""


@dataclass(frozen=True, slots=True)
class Request:
    """What the command line asks for.

    Args:
        checkpoint: A checkpoint or a run's folder.
        out: The folder to write.
        dtype: One of `EXPORT_DTYPES`.
        assets: Where the model's configuration and tokenizer are; None for the run's own.
        is_merged: Write the whole model of adapters.
        base: Where the adapted model is; None for where it was.
        is_overwrite: Replace `out`.
        trust_remote_code: Run code that lies beside the configuration.
        imports: Modules to import first.
    """

    checkpoint: Path
    out: Path
    dtype: str
    assets: Path | None
    is_merged: bool
    base: Path | None
    is_overwrite: bool
    trust_remote_code: bool
    imports: list[str]


def run(argv: Sequence[str]) -> int:
    """Export a checkpoint; returns the exit code.

    Raises:
        ConfigError: Arguments are wrong, or something that they name is missing.
        CheckpointError: The checkpoint cannot be read, or the export not be written.
    """
    if {"-h", "--help"} & set(argv):
        sys.stdout.write(USAGE)
        return 0
    request = parse_request(argv)
    if problems := import_modules(request.imports):
        raise ConfigError.of(problems)
    folder = find_checkpoint(request.checkpoint)
    assets = find_assets(folder, request.assets)
    check_out(request.out, folder=folder, assets=assets, is_overwrite=request.is_overwrite)
    sys.stderr.write(f"checkpoint: {folder}\n")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    # imported only now: a wrong argument is told at once, without waiting for transformers
    from omnilit.checkpoint.offline import export_checkpoint

    dtype = export_checkpoint(
        folder,
        request.out,
        assets=assets,
        dtype=request.dtype,
        trust_remote_code=request.trust_remote_code,
        is_merged=request.is_merged,
        base=request.base,
    )
    sys.stderr.write(f"export: {request.out} ({str(dtype).removeprefix('torch.')})\n")
    return 0


class _Parser(argparse.ArgumentParser):
    """Raises where argparse would end the process."""

    @override
    def error(self, message: str) -> NoReturn:
        raise ConfigError(key="export", problem=message, fix="see omnilit export --help")


def parse_request(argv: Sequence[str]) -> Request:
    """Read the arguments.

    Raises:
        ConfigError: One is missing, unknown or wrong.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("checkpoint", type=_path, metavar=CHECKPOINT_KEY)
    parser.add_argument("out", type=_path, metavar=OUT_KEY)
    parser.add_argument("--dtype", choices=EXPORT_DTYPES, default="auto")
    parser.add_argument("--assets", type=_path)
    parser.add_argument("--merge", action="store_true", dest="is_merged")
    parser.add_argument("--base", type=_path)
    parser.add_argument("--overwrite", action="store_true", dest="is_overwrite")
    parser.add_argument("--trust_remote_code", action="store_true")
    parser.add_argument("--imports", nargs="+", default=[])
    return Request(**vars(parser.parse_args(argv)))


def _path(text: str) -> Path:
    return Path(text).expanduser()


def find_checkpoint(path: Path) -> Path:
    """The good checkpoint that `path` stands for.

    Args:
        path: A checkpoint; or a run's output folder, for its newest good one.

    Raises:
        ConfigError: There is none.
    """
    if not path.is_dir():
        raise ConfigError(
            key=CHECKPOINT_KEY,
            problem=f"{path} is no folder",
            fix="name a global_step_N folder, or a run's output folder",
        )
    if checkpoints_folder(path).is_dir():
        return _find_newest(path)
    export = path / HF_FOLDER if is_export_only(path) else path
    if any((export / name).is_file() for name in ("config.json", "adapter_config.json")):
        problem = f"{export} is in the Hugging Face layout already"
        fix = "use it as it is, or name a global_step_N folder that holds a checkpoint"
        raise ConfigError(key=CHECKPOINT_KEY, problem=problem, fix=fix)
    if (reason := find_damage(path)) is not None:
        raise ConfigError(
            key=CHECKPOINT_KEY,
            problem=f"{path} cannot be exported: {reason}",
            fix="name another global_step_N folder, or the run's output folder for its newest "
            "good one",
        )
    return path


def _find_newest(run_folder: Path) -> Path:
    found = find_latest(run_folder)
    for passed, reason in found.passed_over:
        sys.stderr.write(f"passed over {passed}: {reason}\n")
    if found.path is None:
        raise ConfigError(
            key=CHECKPOINT_KEY,
            problem=f"the run in {run_folder} has no complete checkpoint",
            fix="train with train.checkpoint.save_steps or save_epochs; what is in an hf_ckpt "
            "folder is exported already",
        )
    return found.path


def find_assets(folder: Path, given: Path | None) -> Path:
    """Where the model's own files are.

    Args:
        folder: The checkpoint.
        given: What the command line says.

    Raises:
        ConfigError: They are not there.
    """
    assets = given or folder.resolve().parent.parent / MODEL_ASSETS
    if (assets / "config.json").is_file():
        return assets
    why = "" if given else ", so the run that saved the checkpoint does not say what its model is"
    raise ConfigError(
        key="--assets",
        problem=f"{assets} holds no config.json{why}",
        fix="name a folder with the model's config.json and tokenizer, such as the model that the "
        "run started from",
    )


def check_out(out: Path, *, folder: Path, assets: Path, is_overwrite: bool) -> None:
    """Keep the export from replacing what it is not meant to.

    Args:
        out: The folder to write.
        folder: The checkpoint.
        assets: Where the model's own files are.
        is_overwrite: A folder with something in it may be replaced.

    Raises:
        ConfigError: It would.
    """
    problem = _find_clash(out.resolve(), folder.resolve(), assets.resolve())
    if problem is None and out.exists() and not out.is_dir():
        problem = Problem(OUT_KEY, f"{out} is a file", "name a folder")
    if problem is None and out.is_dir() and any(out.iterdir()) and not is_overwrite:
        fix = "name another folder, or give --overwrite to replace it"
        problem = Problem(OUT_KEY, f"{out} is not empty", fix)
    if problem is not None:
        raise ConfigError.of([problem])


def _find_clash(out: Path, folder: Path, assets: Path) -> Problem | None:
    if out == folder / HF_FOLDER:  # the one thing that is added to a checkpoint
        return None
    fix = "name a folder elsewhere"
    for path in (folder, assets, Path.cwd()):
        if path.is_relative_to(out):
            return Problem(OUT_KEY, f"{out} would be replaced, and {path} with it", fix)
    if out.is_relative_to(folder) or out.parent.name == CHECKPOINTS:
        return Problem(OUT_KEY, f"{out} lies among the checkpoints of a run", fix)
    return None
