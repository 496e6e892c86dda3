import io

import pytest
import torch

from omnilit.checkpoint.stored import pack_plain, read_plain
from omnilit.errors import CheckpointError


def test_plain_values_come_back(tmp_path):
    value = {"a": 1, "b": ["text", None], "c": torch.arange(3)}
    (tmp_path / "x.pt").write_bytes(pack_plain("x.pt", value))
    found = read_plain(tmp_path / "x.pt")
    assert found["c"].tolist() == [0, 1, 2]
    assert {**found, "c": 0} == {**value, "c": 0}


def test_more_than_plain_values_is_refused():
    with pytest.raises(CheckpointError, match=r"x\.pt would hold more than plain values"):
        pack_plain("x.pt", {"a": io.BytesIO()})


@pytest.mark.parametrize(
    "content",
    [b"", b"torn", b"0", b"\xff" * 9, b"U\x05ab", b"h\x07.", b"G\x00.", b"X\x01\x00\x00\x00\xff."],
)
def test_whatever_bytes_a_damaged_file_holds_it_is_named(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.pt cannot be read: "):
        read_plain(tmp_path / "x.pt")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"x\.pt cannot be read: "):
        read_plain(tmp_path / "x.pt")
