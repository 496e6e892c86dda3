from __future__ import annotations

from omnilit.config.check import check_values
from omnilit.config.schema import Field
from omnilit.config.view import View


def test_a_view_gives_values_by_path_with_defaults_filled_in(fields: list[Field]):
    raw = {"train": {"seed": 7, "optimizer": {"lr": 5e-5}}, "data": {"mm_configs": {"a": {}}}}
    view = View.of(check_values(raw, fields), fields, world_size=2, verb="validate")
    assert view["train.seed"] == 7
    assert view["train.max_steps"] is None
    assert view["data.mm_configs"] == {"a": {}}
    assert view["data.train_path"] is None
    assert view.is_given("train.optimizer.lr")
    assert not view.is_given("train.max_steps")
    assert list(view.changed()) == ["train.seed", "data.mm_configs"]
    assert "train.seed" in view
    assert "train.nothing" not in view
    assert (view.world_size, view.verb) == (2, "validate")


def test_a_required_field_that_is_given_counts_as_changed(fields: list[Field]):
    raw = {"data": {"train_path": "d"}}
    assert View.of(check_values(raw, fields), fields).is_changed("data.train_path")
