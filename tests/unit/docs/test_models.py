"""The page of all architectures, against the installed transformers and against itself."""

from __future__ import annotations

import pytest
import transformers

from tests.helpers.guide import DOCS
from tests.sweep.judge import DIFFERS
from tests.sweep.page import Verdict, has_plan, page_of, read_page, update_page
from tests.sweep.subject import EXPORT, LANGUAGE, PACKED, SHARDED, SUBJECTS, TOWERS

PAGES = {subject: (DOCS / subject.page).read_text("utf-8") for subject in SUBJECTS}
TEXT = PAGES[LANGUAGE]
VERDICTS = read_page(TEXT)


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.page)
def test_every_architecture_of_transformers_is_on_its_page(subject):
    text = PAGES[subject]
    verdicts = read_page(text, subject=subject)
    assert [verdict.model_type for verdict in verdicts] == subject.architectures()
    assert f"(transformers {transformers.__version__})" in text.replace("\n", " ")
    assert page_of(verdicts, subject=subject) == text  # as it was written


def test_half_of_what_sees_trains_packed_and_sharded_and_is_exported():
    verdicts = read_page(PAGES[TOWERS], subject=TOWERS)
    whole = [v for v in verdicts if all(v.has(name) for name in (PACKED, SHARDED, EXPORT))]
    assert len(whole) >= 48
    assert not [v.model_type for v in verdicts if v.is_wrong]


def test_a_hundred_architectures_train_packed_and_sharded_and_are_exported():
    whole = [v for v in VERDICTS if all(v.has(name) for name in (PACKED, SHARDED, EXPORT))]
    assert len(whole) >= 100
    assert not [v.model_type for v in VERDICTS if v.is_wrong]
    assert not [v.model_type for v in VERDICTS if not v.is_trained and not v.columns[PACKED]]


def test_every_mixture_with_a_plan_for_its_experts_trains_with_them_split():
    found = {v.model_type: v.has("EP") for v in VERDICTS if v.is_trained and has_plan(v)}
    assert len(found) > 30
    assert all(found.values()), found


def test_judging_some_again_changes_their_rows_alone(tmp_path):
    path = tmp_path / "models.md"
    path.write_text(TEXT)
    update_page(path, [Verdict("llama", {PACKED: "a | b"})])
    (again,) = [v for v in read_page(path.read_text()) if v.model_type == "llama"]
    assert again.columns == {PACKED: "a / b"}
    update_page(path, [v for v in VERDICTS if v.model_type == "llama"])
    assert path.read_text() == TEXT


@pytest.mark.parametrize("why", [f"{DIFFERS}loss 2, not 1", ""])
def test_what_differs_is_no_refusal(why):
    assert Verdict("gpt2", {PACKED: why}).is_wrong is bool(why)
    assert not Verdict("gpt2", {PACKED: "it has a state"}).is_wrong
