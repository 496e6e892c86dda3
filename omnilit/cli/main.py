"""The verbs `fit` and `validate`."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence

from transformers.utils.logging import disable_progress_bar

from omnilit.cli.omni_cli import OmniCLI, print_config, print_help
from omnilit.cli.plan import RunPlan, Verb, make_plan, read
from omnilit.cli.raw import read_command
from omnilit.errors import RestartError
from omnilit.logging import get_logger, process_rank, show_on_rank_zero
from omnilit.parallel.determinism import HASH_SEED, has_fixed_hashes
from omnilit.plugins import IMPORTED

log = get_logger(__name__)


def run(verb: Verb, argv: Sequence[str]) -> int:
    """Check everything, build everything, run.

    Args:
        verb: "fit" or "validate".
        argv: The words after the verb.

    Returns:
        The exit code.

    Raises:
        OmniError: Whatever the user can mend, with all problems of a stage.
    """
    command = read_command(argv)
    if command.help_group is not None:
        print_help(verb, command.help_group, read(command).task.module_class)
        return 0
    if command.is_print_config:
        sys.stdout.write(print_config(read(command)))
        return 0
    _quieten()
    show_on_rank_zero(process_rank())
    plan = make_plan(verb, command)
    _need_fixed_hashes(plan)
    log.info("task: %s (%s)", plan.task.class_path, plan.task.reason)
    if names := ", ".join(IMPORTED):
        log.info("imported: %s", names)
    cli = OmniCLI(plan)
    checkpoint = str(plan.load_path) if plan.load_path else None
    if checkpoint:
        log.info("loading %s", checkpoint)
    step = cli.trainer.fit if verb == "fit" else cli.trainer.validate
    try:
        # not as an argument: the model is made before Lightning would say that one brings weights
        cli.trainer.ckpt_path = checkpoint
        step(cli.model, datamodule=cli.datamodule)
    except SystemExit:
        if cli.trainer.interrupted:  # Lightning's way to end after Ctrl-C
            return 130
        raise
    return 0


def _need_fixed_hashes(plan: RunPlan) -> None:
    """Ask for another start where a deterministic run began with random orders of sets.

    Raises:
        RestartError: PYTHONHASHSEED is not a number.
    """
    key = "train.enable_full_determinism"
    if plan.view[key] and not has_fixed_hashes():
        raise RestartError(key=key, environment={HASH_SEED: str(plan.view["train.seed"])})


def _quieten() -> None:
    """Keep the chatter of the libraries below out of a run's own words."""
    for name in ("lightning.pytorch", "lightning.fabric", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    disable_progress_bar()
    for module in (r"lightning\..*", r"torch\.distributed\..*", r"torch\.utils\.data\..*"):
        warnings.filterwarnings("ignore", module=module)
