import shutil

import pytest
from PIL import Image

from omnilit.tools.report.answers import Answer, choose_steps, read_answers, render_answers
from tests.helpers.markup import parse
from tests.helpers.runs import write_lines

EVIL = "<img onerror='x'>&\""


def line(step, prompt="asked", completion="said", expected="right"):
    texts = {"prompt": prompt, "expected": expected, "completion": completion}
    return {"step": step, "checkpoint": None, "sample": 1, **texts}


def test_what_was_said_to_a_prompt_is_gathered_by_step(tmp_path):
    lines = [
        line(1, "a", "one"),
        line(1, "b", "other"),
        line(2, "a", "two"),
        line(None, "a", "validated"),
    ]
    answers = read_answers(write_lines(tmp_path / "eval_samples.jsonl", lines), [])
    assert answers == (
        Answer("a", "right", ((1, "one"), (2, "two"), (None, "validated"))),
        Answer("b", "right", ((1, "other"),)),
    )


def test_lines_that_are_torn_or_of_another_kind_are_told(tmp_path):
    file = write_lines(
        tmp_path / "eval_samples.jsonl", [line(1), line("1"), {**line(2), "completion": 3}, {}]
    )
    with file.open("a") as more:
        more.write("[]\n{torn")
    notes: list[str] = []
    assert len(read_answers(file, notes)) == 1
    assert notes == ["eval_samples.jsonl: lines left out that cannot be read: 5"]
    assert read_answers(tmp_path / "missing", notes) == ()


@pytest.mark.parametrize(
    ("number", "shown"), [(1, [0]), (4, [0, 1, 2, 3]), (10, [0, 3, 6, 9]), (5, [0, 1, 3, 4])]
)
def test_the_first_and_the_newest_evaluation_are_shown(number, shown):
    assert choose_steps(number) == shown


def test_a_section_shows_texts_as_they_are():
    answers = [Answer(EVIL, "\nright", ((1000, "said"), (None, EVIL)))]
    structure = parse(f"<div>{render_answers(EVIL, answers)}</div>")
    assert "img" not in {tag for tag, _ in structure.seen}
    assert EVIL in structure.texts["h2"]
    assert structure.texts["h3"] == "promptexpectedstep 1,000completion"
    assert structure.texts["pre"].count(EVIL) == 2
    assert "\nright" in structure.texts["pre"]
    assert render_answers("run", ()) == ""


def test_answers_to_the_same_words_about_other_images_stand_apart(tmp_path):
    Image.new("RGB", (32, 16), (9, 99, 9)).save(tmp_path / "a.png")
    (tmp_path / "eval_media").mkdir()
    names = [f"{digit * 16}.png" for digit in "abc"]
    for name in names[:2]:
        shutil.copy(tmp_path / "a.png", tmp_path / "eval_media" / name)
    files = [*names, "../a.png", str(tmp_path / "a.png")]
    media = [[{"caption": f"image {n}", "file": name}] for n, name in enumerate(files)]
    lines = [{**line(step), "media": one} for step in (1, 2) for one in media]
    lines += [{**line(1), "media": odd} for odd in (3, ["x"], [{"file": "b"}])]
    answers = read_answers(write_lines(tmp_path / "eval_samples.jsonl", lines), [])
    assert [len(answer.completions) for answer in answers] == [2, 2, 2, 2, 2, 1]
    html = render_answers("run", answers)
    assert html.count('<img class="tiny" src="data:image/png;base64,') == 2
    assert 'width="192" height="96"' in html
    assert f"image 2: {names[2]} cannot be read" in html
    assert html.count("<p>image 3</p>") == html.count("<p>image 4</p>") == 1  # no file of others
