"""The mesh of a configuration in words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings

from omnilit.config.parallel_sizes import ParallelSizes
from omnilit.errors import ConfigError
from omnilit.parallel.grid import mesh_axes
from omnilit.tools.env import run
from omnilit.tools.mesh_view import MEANINGS, show_ranks
from tests.helpers.models import tiny_config
from tests.helpers.sizes import resolved_sizes

KEY = "train.accelerator"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    tiny_config("qwen3_moe").save_pretrained(tmp_path / "model")
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {{config_path: {tmp_path / 'model'}}}", encoding="utf-8")
    return path


def printed(
    file: Path, world_size: int, capsys: pytest.CaptureFixture[str], **sizes: int | bool | str
) -> list[str]:
    flags = [word for name, size in sizes.items() for word in (f"--{KEY}.{name}", str(size))]
    assert run(["--config", str(file), "--world-size", str(world_size), *flags]) == 0
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_sizes_groups_and_parts_of_the_model_are_shown(
    file: Path, capsys: pytest.CaptureFixture[str]
):
    axes = {"dp_replicate_size": 2, "ulysses_size": 2, "tp_size": 2, "ep_size": 4}
    assert printed(file, 16, capsys, **axes) == [
        "sizes of 16 ranks",
        "axis given ranks",
        "pp 1 1",
        "dp_replicate 2 2",
        "dp_shard -1 2",
        "cp 1 1",
        "ulysses 2 2",
        "tp 2 2",
        "efsdp 2",
        "ep 4 4",
        "",
        "who shares what",
        "mesh axes ranks groups the ranks of a group first groups",
        (
            "data dp_replicate x dp_shard 4 4 read different data "
            "0 4 .. 12 | 1 5 .. 13 | 2 6 .. 14 | ..."
        ),
        (
            "loss dp_replicate x dp_shard x cp x ulysses 8 2 hold tokens of their own, whose "
            "losses are summed 0 2 .. 14 | 1 3 .. 15"
        ),
        (
            "fsdp dp_replicate 2 8 hold the same dense parameters, whose gradients are summed "
            "0 8 | 1 9 | 2 10 | ..."
        ),
        (
            "fsdp dp_shard x cp x ulysses 4 4 share one copy of the dense parameters "
            "0 2 .. 6 | 1 3 .. 7 | 8 10 .. 14 | ..."
        ),
        "sequence cp x ulysses 2 8 hold parts of the same sequences 0 2 | 1 3 | 4 6 | ...",
        "ulysses ulysses 2 8 trade their part of a sequence for heads 0 2 | 1 3 | 4 6 | ...",
        "tp tp 2 8 split each matrix 0-1 | 2-3 | 4-5 | ...",
        "sparse dp_replicate 2 8 hold the same part of the same experts 0 8 | 1 9 | 2 10 | ...",
        "sparse efsdp 2 8 share the same experts 0 4 | 1 5 | 2 6 | ...",
        "sparse ep 4 4 hold different experts 0-3 | 4-7 | 8-11 | ...",
        "",
        "qwen3_moe on these ranks",
        "what in all a rank",
        "layers 2 2",
        "attention heads 4 1",
        "key-value heads 2 1",
        "hidden size 64 64",
        "vocabulary 256 128",
        "experts of a layer 8 2",
    ]


def test_experts_outside_show_neighbours_that_share_an_expert(
    file: Path, capsys: pytest.CaptureFixture[str]
):
    lines = printed(file, 8, capsys, ep_size=2, ep_outside="true")
    assert lines.index("ep 2 2") < lines.index("efsdp 4")
    assert "sparse efsdp 4 2 share the same experts 0-3 | 4-7" in lines
    assert "sparse ep 2 4 hold different experts 0 4 | 1 5 | 2 6 | ..." in lines


def test_a_single_rank_has_the_two_meshes_of_every_run(
    file: Path, capsys: pytest.CaptureFixture[str]
):
    lines = printed(file, 1, capsys)
    start, end = lines.index("who shares what"), lines.index("qwen3_moe on these ranks")
    assert [line.split()[0] for line in lines[start + 2 : end - 1]] == ["data", "fsdp"]


@pytest.mark.parametrize(
    ("sizes", "keys", "is_shown"),
    [
        ({"ulysses_size": 3}, ["ulysses_size", "ulysses_size"], False),
        ({"tp_size": 4, "ep_size": 3}, ["ep_size", "tp_size", "ep_size"], False),
        ({"tp_size": 4}, ["tp_size"], True),
        ({"tp_size": 0}, ["tp_size"], False),
        ({"ep_outside": "true"}, ["ep_outside"], True),
    ],
)
def test_what_does_not_fit_is_told_beside_the_mesh(
    sizes: dict[str, int],
    keys: list[str],
    is_shown: bool,
    file: Path,
    capsys: pytest.CaptureFixture[str],
):
    with pytest.raises(ConfigError) as caught:
        printed(file, 8, capsys, **sizes)
    assert [problem.key for problem in caught.value.problems] == [f"{KEY}.{key}" for key in keys]
    assert ("who shares what" in capsys.readouterr().out) == is_shown


def test_a_wrong_key_is_refused(file: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(ConfigError, match="unknown key 'ulises_size'"):
        printed(file, 8, capsys, ulises_size=2)


def test_a_model_that_cannot_be_read_does_not_hide_the_mesh(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {{config_path: {tmp_path}}}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"model\.config_path: the folder .* holds no config"):
        printed(path, 8, capsys)
    assert "who shares what" in capsys.readouterr().out


@settings(max_examples=40)
@given(resolved_sizes())
def test_ranks_of_every_group_are_evenly_spaced_and_every_axis_has_a_meaning(
    sizes: ParallelSizes,
):
    for axis in mesh_axes(sizes):
        assert (axis.mesh, axis.name) in MEANINGS
        for group in axis.groups():
            assert len(set(np.diff(group).tolist())) <= 1


def test_ranks_are_shown_in_short():
    groups = ((3,), (0, 1, 2), (0, 4), (1, 3, 5, 7))
    assert [show_ranks(group) for group in groups] == ["3", "0-2", "0 4", "1 3 .. 7"]
