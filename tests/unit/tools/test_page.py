import base64
import hashlib
import re

import pytest

from omnilit.errors import ConfigError
from omnilit.tools.data_report import Table
from omnilit.tools.page import build_document, render_table, save_page


def test_only_the_script_of_the_page_itself_may_run():
    page = build_document("a & b", "<p>text</p>", script="let x = '<';")
    digest = base64.b64encode(hashlib.sha256(b"let x = '<';").digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page
    assert "<script>let x = '<';</script></body>" in page
    assert "<title>a &amp; b</title>" in page


def test_a_page_without_a_script_runs_none():
    page = build_document("title", "")
    assert "default-src 'none'" in page
    assert "script-src 'none'" in page
    assert "<script" not in page


def test_own_style_stands_behind_the_common_one():
    page = build_document("title", "", style="p { color: red; }")
    (style,) = re.findall("<style>(.*)</style>", page, re.DOTALL)
    assert style.index(":root") < style.index("p { color: red; }")


def test_a_table_escapes_its_cells_and_says_its_kind():
    table = Table("a<b", ("<i>", "y"), (("1<2", "&"),))
    html = render_table(table, kind="words")
    assert "<h2>a&lt;b</h2>" in html
    assert '<table class="words">' in html
    assert "<td>1&lt;2</td><td>&amp;</td>" in html
    assert '<th scope="col">&lt;i&gt;</th>' in html


def test_a_page_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--html: .*a\.html cannot be written"):
        save_page("x", tmp_path / "file" / "a.html", key="--html")


def test_the_folder_of_a_page_is_made(tmp_path):
    save_page("x", tmp_path / "new" / "a.html", key="--html")
    assert (tmp_path / "new" / "a.html").read_text() == "x"


def test_half_a_character_does_not_keep_a_page_from_being_written(tmp_path):
    save_page("a\ud83d b", tmp_path / "a.html", key="--html")
    assert (tmp_path / "a.html").read_text("utf-8") == "a&#55357; b"
