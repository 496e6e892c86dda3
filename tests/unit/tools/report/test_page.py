import re

import pytest

from omnilit.data.quarantine import BadRecord, Quarantine
from omnilit.tools.data_view import Piece, ShownSample
from omnilit.tools.report.page import build_page
from omnilit.tools.report.runs import read_runs
from omnilit.tools.report.samples import SharedSamples
from omnilit.types import Origin
from tests.helpers.markup import parse
from tests.helpers.runs import step_line, write_lines, write_run

EVIL = "<img onerror='x'>&\""


def sample(text):
    return ShownSample(1, Origin("s", "f", 1), 2, 1, (("", (Piece(text, 1, is_special=False),)),))


def test_the_page_is_well_formed_and_shows_both_runs(tmp_path):
    runs = read_runs([write_run(tmp_path / "a"), write_run(tmp_path / "b", lr=2e-3)])
    page = build_page(runs, [SharedSamples(("a", "b"), (sample("the text"),))])
    structure = parse(page)
    tags = [tag for tag, _ in structure.seen]
    assert tags.count("figure") == tags.count("svg") == 9
    assert structure.texts["h1"] == "2 runs"
    assert structure.texts["mark"].endswith("the text")
    for text in ("train.optimizer.lr", "0.002", "Training data of a, b", "evaluation loss, best"):
        assert text in "".join(structure.texts.values())


def test_the_page_needs_nothing_beside_itself(tmp_path):
    page = build_page(read_runs([write_run(tmp_path / "a")]))
    tags = {tag for tag, _ in parse(page).seen}
    assert not {"link", "img", "iframe", "object", "embed"} & tags
    without_namespace = page.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"(src|href)=|url\(|@import|https?:", without_namespace)


def test_everything_from_outside_is_escaped(tmp_path):
    folder = write_run(tmp_path / EVIL, numbers={f"part/{EVIL}": 1.0})
    (folder / "config.resolved.yaml").write_text(f"'{EVIL.replace(chr(39), '')}': </script><b>\n")
    Quarantine(folder / "quarantine.jsonl").add([BadRecord(EVIL, EVIL, 1, EVIL, EVIL)])
    write_lines(folder / "eval.jsonl", [{EVIL: EVIL}])
    (folder / "checkpoints" / "global_step_1").mkdir(parents=True)
    runs = read_runs([folder, write_run(tmp_path / "b")])
    shared = [SharedSamples((EVIL,), (sample(EVIL),)), SharedSamples((EVIL,), problem=EVIL)]
    structure = parse(build_page(runs, shared))
    assert "img" not in {tag for tag, _ in structure.seen}
    for tag in ("h2", "td", "th", "label", "b", "mark", "p"):
        assert EVIL in structure.texts[tag]
    assert "</script><b>" in structure.texts["pre"]


def test_each_run_has_a_colour_a_box_and_beyond_seven_another_dash(tmp_path):
    runs = read_runs([write_run(tmp_path / f"run{i}", 2) for i in range(8)])
    page = build_page(runs)
    assert ".r0, .k0 { --run: var(--run0); --dash: none; }" in page
    assert ".r7, .k7 { --run: var(--run0); --dash: 60 40; }" in page
    inputs = [attributes for tag, attributes in parse(page).seen if tag == "input"]
    boxes = [box for box in inputs if (box.get("id") or "").startswith("run")]
    assert len(boxes) == 8
    assert all("checked" in box for box in boxes)


def test_colours_exist_in_light_and_dark(tmp_path):
    page = build_page(read_runs([write_run(tmp_path / "a", 2)]))
    light, dark = page.split(":root { --run0")[1:]
    assert len(re.findall(r"--run\d: #", light)) == len(re.findall(r"--run\d: #", dark)) == 6
    assert "prefers-color-scheme: dark" in light


def test_one_run_has_its_name_as_title_and_no_differences(tmp_path):
    page = build_page(read_runs([write_run(tmp_path / "mine")]))
    assert "<title>Run mine</title>" in page
    assert "Settings that differ" not in page


def test_equal_configurations_have_no_differences(tmp_path):
    page = build_page(read_runs([write_run(tmp_path / "a"), write_run(tmp_path / "b")]))
    assert "<h2>Settings that differ</h2><p>None.</p>" in page


def test_runs_without_configuration_or_steps_say_so(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").touch()
    page = build_page(read_runs([tmp_path / "a", tmp_path / "b"]))
    parse(page)
    assert "<figure" not in page
    assert "There are not two configurations to compare." in page
    assert "a: metrics.jsonl holds no step yet" in page
    assert "a: config.resolved.yaml is missing." in page
    assert "<p>None is there.</p>" in page
    assert "No complete checkpoint tells them." in page


@pytest.mark.parametrize("loss", [0.0, 1e-45, -3.4e38, 3.4e38, 1e308, 5e-324])
def test_a_run_whose_numbers_are_at_the_ends_of_their_type_has_a_page(loss, tmp_path):
    folder = tmp_path / "a"
    lines = [step_line(step, loss=loss * (step % 2), grad_norm=abs(loss)) for step in range(1, 5)]
    write_lines(folder / "metrics.jsonl", lines)
    page = build_page(read_runs([folder]))
    parse(page)
    assert "Learning rate" in page


def test_a_group_of_many_charts_is_closed_at_first(tmp_path):
    few = write_run(tmp_path / "a", 2, numbers={f"few/{i}": i for i in range(3)})
    many = write_run(tmp_path / "b", 2, numbers={f"many/{i}": i for i in range(30)})
    page = build_page(read_runs([few, many]))
    assert "<details open><summary><h2>few</h2>" in page
    assert "<details><summary><h2>many</h2>" in page


def test_runs_of_different_lengths_share_their_axis(tmp_path):
    write_lines(tmp_path / "b" / "metrics.jsonl", [step_line(step) for step in range(1, 101)])
    page = build_page(read_runs([write_run(tmp_path / "a", 10), tmp_path / "b"]))
    assert set(re.findall(r'v0 linear" data-x="([^"]*)"', page)) == {"1.0 100"}
