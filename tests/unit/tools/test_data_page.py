import re

import numpy as np

from omnilit.tools.data_page import build_page
from omnilit.tools.data_report import Packing, PartReport, SourceData
from omnilit.tools.data_view import Piece, ShownSample
from omnilit.types import Origin
from tests.helpers.markup import parse

EVIL = "<script>alert('&\"')</script>"


def page_of(*pieces, name="docs", parts=None):
    lengths = np.asarray([3, 5], np.int64)
    source = SourceData(name, lengths, lengths - 1, lengths, num_records=2)
    report = PartReport("train", (source,), Packing(1, 8, 8, "best fit"), notes=("a < b",))
    sample = ShownSample(1, Origin(name, "a<b>.jsonl", 7), 5, 4, parts or (("", pieces),))
    return build_page(f"Data of {name}", [report], [sample])


def test_everything_from_the_data_is_escaped():
    page = page_of(Piece(EVIL, 0, is_special=False), Piece(EVIL, 1, is_special=True), name=EVIL)
    structure = parse(page)
    assert "script" not in {tag for tag, _ in structure.seen}
    assert structure.texts["pre"] == f"\n{EVIL}{EVIL}"
    assert structure.texts["mark"] == f"Marked text{EVIL}"
    assert EVIL in structure.texts["td"]
    assert "a<b>.jsonl:7" in structure.texts["h3"]


def test_the_page_needs_nothing_beside_itself():
    page = page_of(Piece("text", 1, is_special=False))
    tags = [tag for tag, _ in parse(page).seen]
    assert not {"link", "script", "img", "iframe"} & set(tags)
    assert not re.search(r"(src|href)=|url\(|@import|https?:", page)
    assert tags.count("svg") == 1


def test_the_page_reads_in_light_and_dark():
    page = page_of(Piece("text", 1, is_special=False))
    assert "prefers-color-scheme: dark" in page
    light, dark = page.split("@media", 1)
    names = re.findall(r"(--\w+): #", light)
    assert sorted(names) == sorted(re.findall(r"(--\w+): #", dark.partition("} }")[0]))


def test_neighbours_of_one_weight_share_a_mark():
    page = page_of(
        Piece("ask", 0, is_special=False),
        Piece("yes", 0.5, is_special=False),
        Piece("<end>", 0.5, is_special=True),
        Piece("no", 1, is_special=False),
    )
    body = page[page.index("<pre>") : page.index("</pre>")]
    assert body == (
        '<pre>\nask<mark>yes<span class="special">&lt;end&gt;</span></mark>'
        '<span class="weight">{0.5}</span><mark>no</mark>'
    )


def test_a_pair_has_a_heading_for_each_answer():
    pieces = (Piece("x", 1, is_special=False),)
    page = page_of(parts=(("chosen", pieces), ("rejected", pieces)))
    assert "<h3>chosen</h3><pre>\n<mark>x</mark></pre><h3>rejected</h3>" in page


def test_numbers_and_notes_are_there():
    structure = parse(page_of())
    assert "train: recordstrain: tokenstrain: packing" in structure.texts["h2"]
    assert "100.000 %" in structure.texts["td"]
    assert "Note: a < b" in structure.texts["p"]
