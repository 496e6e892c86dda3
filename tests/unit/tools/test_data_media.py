"""`omnilit data` and the report on data with images."""

import json
import re
import shutil
from typing import Any

import pytest
import yaml
from rich.console import Console

from omnilit.__main__ import main
from omnilit.cli.plan import make_data_view
from omnilit.tools.data import parse_request
from omnilit.tools.data_load import load_data
from omnilit.tools.data_report import build_tables
from omnilit.tools.data_view import show_samples
from omnilit.tools.page import render_sample
from omnilit.tools.report.runs import read_runs
from omnilit.tools.report.samples import show_samples as show_samples_of
from tests.helpers.media_runs import ask, write_seeing_model
from tests.helpers.processors import write_image

WORDS = {"type": "text", "text": "What?"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and five records: of one image, two, none, a damaged one, and one that is gone."""
    folder = tmp_path_factory.mktemp("data")
    write_seeing_model(folder / "model")
    write_image(folder / "small.png", 64, 64)
    write_image(folder / "large.png", 128, 64)
    write_image(folder / "cut.png", 64, 64, seed=3)
    whole = (folder / "cut.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    names = (["small.png"], ["large.png", "small.png"], [], ["cut.png"], ["gone.png"])
    rows = [ask(*({"type": "image", "image": n} for n in found), WORDS) for found in names]
    (folder / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


@pytest.fixture
def words(folder, tmp_path, monkeypatch):
    """The words of a command on these data."""
    monkeypatch.setenv("OMNILIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("omnilit.tools.data.show_on_rank_zero", lambda rank: None)
    model = ("--model", "VLMModule", "--model.config_path", str(folder / "model"))
    return ["data", *model, "--data.train_path", str(folder / "train.jsonl")]


def load(words, **given: Any):
    return load_data(make_data_view(parse_request(words[1:]).command), **given)


def test_media_are_counted_with_their_tokens_and_sizes(words):
    (part,) = load(words).parts
    table = next(t for t in build_tables(part) if t.title == "train: images, videos and sounds")
    (row,) = table.rows
    found = dict(zip(table.header, row, strict=True))
    (source,) = part.sources
    # 4 places an image of 64 x 64, 8 of the larger one
    share = f"{100 * 20 / source.lengths.sum():.1f} %"
    assert found == {
        "source": "train",
        "kind": "image",
        "number": "4",
        "samples with any": "3",
        "tokens": "20",
        "share of all": share,
        "tokens each p50": "4",
        "max": "8",
        "smallest": "64 x 64",
        "largest": "64 x 128",
    }
    assert part.num_bad == 1
    assert "gone.png: cannot be read" in part.bad[0].reason
    assert (part.damaged, part.num_damaged) == ((), None)


def test_what_is_damaged_behind_its_head_is_found_by_decoding(words, capsys):
    silent = [*words, "--data.silent_exception", "true", "--data.max_bad_fraction", "0.5"]
    assert main([*silent, "--decode"]) == 0
    (listing,) = [text for text in capsys.readouterr().out.split("\n\n") if "damaged im" in text]
    assert re.search(r"train\.jsonl:4: .*cut\.png: it is damaged", listing)
    assert listing.count("To fix") == 1
    assert main([*words, "--decode"]) == 2
    assert "train: 1 images, videos or sounds cannot be decoded" in capsys.readouterr().err


def test_samples_show_their_images_and_one_place_of_each(words, capsys):
    samples = load(words, num_shown=4).samples
    captions = [[picture.caption for picture in sample.pictures] for sample in samples]
    assert captions[:3] == [
        ["image, 64 x 64, 4 tokens"],
        ["image, 64 x 128, 8 tokens", "image, 64 x 64, 4 tokens"],
        [],
    ]
    assert "cut.png: it is damaged" in captions[3][0]
    show_samples(samples[:2], Console(width=400))
    text = capsys.readouterr().out
    assert text.count("<|image_pad|>") == 3
    assert "(image, 64 x 128, 8 tokens)\n" in text
    assert "[[Red.<|im_end|>]]" in text
    (one, other) = (render_sample(sample) for sample in samples[1:3])
    assert len(re.findall(r'<img[^>]* src="data:image/(?:png|jpeg);base64,', one)) == 2
    assert "<img" not in other


def test_the_report_reads_images_with_the_processor_of_the_run(folder, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    settings = {
        "model": {"class_path": "VLMModule", "init_args": {"config_path": "gone"}},
        "data": {"train_path": str(folder / "train.jsonl")},
        "train": {"checkpoint": {"output_dir": str(run)}},
    }
    (run / "config.resolved.yaml").write_text(yaml.safe_dump(settings))
    shutil.copytree(folder / "model", run / "model_assets")
    (shared,) = show_samples_of(read_runs([run]), 3)
    assert shared.problem is None
    assert [len(sample.pictures) for sample in shared.samples] == [1, 2, 0]
