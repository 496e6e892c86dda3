"""The confusion matrix as a table for people."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from omnilit.callbacks.confusion import ConfusionTable, table_of, to_markdown
from omnilit.types import Confusion

FOUND = Confusion(("cat", "dog|wolf"), [[3, 1], [0, 2]])


def trainer(*loggers: Any, **over: Any) -> Any:
    given = {"is_global_zero": True, "fast_dev_run": False, "global_step": 7}
    return SimpleNamespace(loggers=list(loggers), **{**given, **over})


def module(confusion: Confusion | None = FOUND) -> Any:
    return SimpleNamespace(eval_confusion=confusion)


def test_a_row_is_a_class_and_what_it_was_taken_for():
    header, rows = table_of(FOUND)
    assert header == ["class", "cat", "dog|wolf"]
    assert rows == [["cat", 3, 1], ["dog|wolf", 0, 2]]


def test_markdown_keeps_names_in_their_cells():
    assert to_markdown(*table_of(FOUND)).splitlines() == [
        r"| class | cat | dog\|wolf |",
        "| --- | --- | --- |",
        "| cat | 3 | 1 |",
        r"| dog\|wolf | 0 | 2 |",
    ]


def test_tensorboard_gets_a_text_at_the_step(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    ConfusionTable().on_validation_end(trainer(logger), module())
    logger.experiment.flush()
    events = EventAccumulator(str(tmp_path)).Reload()
    (event,) = events.Tensors("eval_confusion/text_summary")
    assert event.step == 7
    assert b"| cat | 3 | 1 |" in event.tensor_proto.string_val[0]


def test_the_log_has_a_table_of_few_classes(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("omnilit"), "propagate", True)
    with caplog.at_level(logging.INFO):
        ConfusionTable().on_validation_end(trainer(), module())
    assert "dog|wolf  0    2" in caplog.text
    caplog.clear()
    many = Confusion(tuple(map(str, range(30))), [[0] * 30] * 30)
    with caplog.at_level(logging.INFO):
        ConfusionTable().on_validation_end(trainer(), module(many))
    assert not caplog.text


@pytest.mark.parametrize(
    ("over", "confusion"),
    [({"is_global_zero": False}, FOUND), ({"fast_dev_run": True}, FOUND), ({}, None)],
)
def test_other_ranks_trial_runs_and_other_tasks_say_nothing(over, confusion, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("omnilit"), "propagate", True)
    with caplog.at_level(logging.INFO):
        ConfusionTable().on_validation_end(trainer(**over), module(confusion))
    assert not caplog.text
