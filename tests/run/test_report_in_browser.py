"""The page of `omnilit report` as a browser shows it."""

from __future__ import annotations

import html
import json
import re

import numpy as np
import pytest
from PIL import Image

from omnilit.tools.page import build_document
from omnilit.tools.report.page import build_page
from omnilit.tools.report.runs import read_runs
from tests.helpers.browser import DARK, LIGHT, show, take_picture
from tests.helpers.runs import write_lines, write_run

pytestmark = pytest.mark.timeout(180)
EVIL = "<img src=x onerror=alert(1)>"
PICTURE, COLOUR = f"{'0a' * 8}.png", (210, 30, 160)
# Chooses and points as a reader would, and keeps what is to be seen after each step
STEPS = """
const chart = document.querySelector(".chart"), svg = chart.querySelector("svg");
const isSeen = (element) => element.getBoundingClientRect().width > 0;
const views = () => [...svg.querySelectorAll(".view")].filter(isSeen);
const seen = (choice) => [...views()[0].querySelectorAll(choice)].filter(isSeen);
const check = (id, value = true) => (document.getElementById(id).checked = value);
function look() {
  const [view, ...others] = views();
  return {
    view: view.getAttribute("class"), others: others.length,
    raw: seen(".raw").map((path) => path.parentNode.classList[1]),
    means: seen(".mean").map((path) => path.getAttribute("class")),
    strokes: seen(".raw").map((path) => getComputedStyle(path).stroke),
    faint: seen(".raw").map((path) => getComputedStyle(path).opacity),
  };
}
function point(share) {
  const box = svg.getBoundingClientRect();
  const x = box.left + ((56 + share * (548 - 56)) / 560) * box.width;
  svg.dispatchEvent(new PointerEvent("pointermove", { clientX: x, clientY: box.top + 50 }));
  const circles = [...svg.querySelectorAll(".marks circle")];
  const places = circles.map((circle) => [+circle.getAttribute("cx"), +circle.getAttribute("cy")]);
  return { text: chart.querySelector(".tip").innerText, places, curves: svg.dataset.plot };
}
const result = { charts: document.querySelectorAll(".chart svg").length };
result.first = look();
result.pointed = point(0.5);
svg.dispatchEvent(new PointerEvent("pointerleave"));
result.left = [isSeen(chart.querySelector(".tip")), svg.querySelectorAll(".marks").length];
check("smooth0"); result.unsmoothed = look();
check("smooth2"); result.smoother = look();
check("range2"); result.tail = look(); result.pointedAtTail = point(0);
check("range0"); chart.querySelector(".log").checked = true;
result.logarithmic = look(); result.pointedAtLog = point(1);
check("run0", false); result.hidden = look(); result.pointedAtOne = point(0.5);
document.body.append(Object.assign(document.createElement("pre"),
  { id: "result", textContent: JSON.stringify(result) }));
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report of two runs of 40 steps, the second one with hostile names everywhere."""
    folder = tmp_path_factory.mktemp("report")
    one = write_run(folder / "one", 40)
    other = write_run(folder / EVIL.replace("/", ""), 40, lr=2e-3, numbers={f"part/{EVIL}": 1.0})
    lines = (other / "metrics.jsonl").read_text().splitlines()
    doubled = [{**(line := json.loads(text)), "loss": 2 * line["loss"]} for text in lines]
    (other / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in doubled))
    asked = {"step": 5, "prompt": f"{EVIL} asked", "expected": "", "completion": "said by one"}
    seen = [{"caption": f"image {EVIL}", "file": PICTURE}]
    write_lines(one / "eval_samples.jsonl", [{**asked, "media": seen}])
    (one / "eval_media").mkdir()
    Image.new("RGB", (32, 16), COLOUR).save(one / "eval_media" / PICTURE)
    file = folder / "report.html"
    file.write_text(build_page(read_runs([one, other])))
    return file


@pytest.fixture(scope="module")
def seen(page):
    """What a reader sees, step by step."""
    text = page.read_text()
    (policy,) = re.findall(r'<meta http-equiv="Content-Security-Policy"[^>]*>', text)
    file = page.with_name("steps.html")  # its own policy would not let the steps run
    file.write_text(text.replace(policy, "").replace("</body>", f"<script>{STEPS}</script></body>"))
    shown = show(file)
    assert shown.complaints == []
    (result,) = re.findall(r'<pre id="result">(.*?)</pre>', shown.dom, re.DOTALL)
    return json.loads(html.unescape(result))


def test_the_page_runs_its_script_and_nothing_is_blocked_or_fails(page):
    shown = show(page)
    assert shown.complaints == []
    assert shown.dom.count('<div class="tip">') == shown.dom.count("<figure") == 10
    assert shown.dom.count("<img") == 1
    assert '<img class="tiny" src="data:image/png;base64,' in shown.dom
    assert "said by one" in shown.dom


def test_the_console_would_tell_of_an_error_and_of_a_foreign_script(tmp_path):
    foreign = "<script>document.title = 'taken'</script><img src='x.png'>"
    (tmp_path / "x.html").write_text(build_document("x", foreign, script="noSuchFunction();"))
    shown = show(tmp_path / "x.html")
    assert "<title>x</title>" in shown.dom
    *blocked, failed = shown.complaints
    assert len(blocked) == 2
    assert all("Content Security Policy" in one for one in blocked)
    assert "noSuchFunction is not defined" in failed


def test_both_curves_are_there_in_colours_of_their_own(seen):
    first = seen["first"]
    assert (first["view"], first["others"]) == ("view v0 linear", 0)
    assert first["raw"] == ["r0", "r1"]
    assert len(set(first["strokes"])) == 2
    assert first["means"] == ["mean m1", "mean m1"]
    assert first["faint"] == ["0.28", "0.28"]


def test_smoothing_is_a_choice(seen):
    assert seen["unsmoothed"]["means"] == []
    assert seen["unsmoothed"]["faint"] == ["1", "1"]
    assert seen["smoother"]["means"] == ["mean m2", "mean m2"]


def test_range_and_scale_are_choices(seen):
    assert (seen["tail"]["view"], seen["tail"]["others"]) == ("view v2 linear", 0)
    log = seen["logarithmic"]
    assert (log["view"], log["others"]) == ("view v0 logarithmic", 0)


def test_the_pointer_shows_the_values_of_the_nearest_step(seen):
    """Loss of step s is 4 / s and 8 / s; the middle of 40 steps is step 20 or 21."""
    step = int(re.findall(r"step (\d+)", seen["pointed"]["text"])[0])
    assert step in (20, 21)
    lines = seen["pointed"]["text"].splitlines()
    assert [line.split()[0] for line in lines[1:]] == [f"{4 / step:.6g}", f"{8 / step:.6g}"]
    assert lines[1].endswith(" one")
    assert lines[2].endswith(EVIL)
    low, high = 0.1 - 0.05 * 7.9, 8 + 0.05 * 7.9
    for (x, y), loss in zip(seen["pointed"]["places"], (4 / step, 8 / step), strict=True):
        assert x == pytest.approx(56 + (step - 1) / 39 * 492)
        assert y == pytest.approx(212 - (loss - low) / (high - low) * 202, abs=0.01)
    assert seen["left"] == [False, 0]


def test_the_pointer_follows_range_scale_and_hidden_runs(seen):
    assert seen["pointedAtTail"]["text"].startswith("step 37")
    (_, first), (_, second) = seen["pointedAtLog"]["places"]
    assert first > second  # the smaller loss is lower
    assert seen["hidden"]["raw"] == ["r1"]
    assert len(seen["pointedAtOne"]["places"]) == 1
    assert EVIL in seen["pointedAtOne"]["text"]


def find_colour(pixels, colour):
    """Where pixels are of about this colour; [height, width]."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return np.abs(pixels.astype(int) - wanted).max(axis=-1) <= 12


@pytest.mark.parametrize(
    ("scheme", "back", "colours"),
    [(LIGHT, "#ffffff", ("#0072b2", "#d55e00")), (DARK, "#15181c", ("#56a8e8", "#ff8a3d"))],
)
def test_a_picture_shows_two_curves_in_light_and_in_dark(page, tmp_path, scheme, back, colours):
    pixels = take_picture(page, tmp_path / "page.png", scheme)
    assert pixels.shape == (1800, 1366, 3)
    assert find_colour(pixels, back).mean() > 0.5
    for colour in colours:
        is_curve = find_colour(pixels[700:, :683], colour)  # the left charts, below the tables
        assert is_curve.any(axis=0).sum() > 500  # from one end of the plot to the other


def test_a_picture_of_a_sample_is_drawn_as_large_as_it_is_to_be_seen(page, tmp_path):
    pixels = take_picture(page, tmp_path / "page.png", LIGHT, size=(1366, 4000))
    is_picture = np.abs(pixels.astype(int) - COLOUR).max(axis=-1) <= 2
    assert (is_picture.any(axis=0).sum(), is_picture.any(axis=1).sum()) == (192, 96)
