"""What the tests of the data package share."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from omnilit.types import Origin, Record
from tests.helpers.tokenizers import build_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """ChatML with {% generation %}."""
    return build_tokenizer()


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Write objects, or raw lines, to a file of the test's folder."""

    def write(rows: list[object], name: str = "data.jsonl") -> Path:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return file

    return write


@pytest.fixture
def record() -> Callable[..., Record]:
    """A record of the given fields, from line 7 of d.jsonl."""
    return lambda **fields: Record(fields, Origin("train", "d.jsonl", 7))


@pytest.fixture
def workers_end() -> Iterator[None]:
    """End a failed loader's workers here: torch watches them until it is collected."""
    yield
    with pytest.MonkeyPatch.context() as patch:
        # How long torch waits for a worker that has raised before it ends it.
        patch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)
        gc.collect()
