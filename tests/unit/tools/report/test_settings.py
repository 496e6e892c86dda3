import pytest

from omnilit.tools.report.settings import Settings, find_differences, read_settings


def settings(tmp_path, text):
    (tmp_path / "config.resolved.yaml").write_text(text)
    return read_settings(tmp_path)


def test_every_leaf_has_its_path(tmp_path):
    found = settings(
        tmp_path, "a:\n  b: 1.0e-05\n  c: [x, true]\nd: null\ne: ${oc.env:KEY}\nf: {}\n"
    )
    assert found.values == {
        "a.b": "1e-05", "a.c.0": "x", "a.c.1": "true", "d": "null", "e": "${oc.env:KEY}", "f": "{}",
    }  # fmt: skip
    assert found.problem is None


@pytest.mark.parametrize(
    ("text", "problem"),
    [("a: [", "cannot be read"), ("- 1", "holds no settings"), ("", "holds no settings")],
)
def test_a_file_that_is_no_configuration_says_so(tmp_path, text, problem):
    assert problem in (settings(tmp_path, text).problem or "")


def test_a_missing_file_and_one_that_is_no_text_say_so(tmp_path):
    assert read_settings(tmp_path).problem == "config.resolved.yaml is missing"
    (tmp_path / "config.resolved.yaml").write_bytes(b"\xff\xfe\xff")
    assert "cannot be read" in (read_settings(tmp_path).problem or "")


def test_only_settings_that_differ_are_rows_in_the_order_of_the_files():
    runs = [
        Settings({"lr": "0.1", "seed": "1", "out": "a"}),
        Settings({"lr": "0.2", "seed": "1", "out": "b", "extra": "x"}),
        Settings({"lr": "0.1", "seed": "1", "out": "c"}),
    ]
    assert find_differences(runs) == [
        ("lr", "0.1", "0.2", "0.1"),
        ("out", "a", "b", "c"),
        ("extra", "-", "x", "-"),
    ]


def test_a_configuration_that_cannot_be_read_differs_from_none():
    unread = Settings(problem="is missing")
    assert find_differences([Settings({"lr": "1"}), unread, Settings({"lr": "1"})]) == []
    assert find_differences([Settings({"lr": "1"}), unread, Settings({"lr": "2"})]) == [
        ("lr", "1", "-", "2")
    ]
