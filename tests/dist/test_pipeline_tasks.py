"""What tasks, callbacks and loaders of a user's own find where a model runs in stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from omnilit.errors import ConfigError
from omnilit.testing import run_ranks
from tests.helpers.tasks import run_task, write_task

pytestmark = [pytest.mark.dist, pytest.mark.timeout(180)]
PP: dict[str, Any] = {"pp_size": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    write_task(folder, model={})
    return folder


def train_refused(folder: Path, settings: dict[str, Any]) -> str:
    try:
        run_task(folder, "refused", {"accelerator": PP, **settings})
    except ConfigError as error:
        return str(error)
    return "nothing"


def test_a_step_of_too_few_micro_batches_is_refused(folder, tmp_path):
    for said in run_ranks(train_refused, 2, folder, {"global_batch_size": 1}, tmp_path=tmp_path):
        assert said == (
            "train.global_batch_size: a step has 1 micro-batches, and 1f1b takes at least one for "
            "each of 2 stages. To fix: give a step more micro-batches."
        )
