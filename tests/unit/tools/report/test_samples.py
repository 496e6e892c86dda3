import shutil

import pytest
import yaml

from omnilit.tools.report.runs import read_runs
from omnilit.tools.report.samples import show_samples
from tests.helpers.bad_records import write_bad_records
from tests.helpers.training import write_conversations, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def write(tmp_path, model, monkeypatch):
    """Write the folder of a run whose configuration names this data."""
    monkeypatch.setenv("OMNILIT_CACHE", str(tmp_path / "cache"))

    def write_run(name, data, *, task="SFTModule", has_assets=False, **over):
        folder = tmp_path / name
        folder.mkdir()
        paths = {"config_path": str(model), "tokenizer_path": str(model)}
        settings = {
            "model": {"class_path": task, "init_args": paths},
            "data": {"train_path": str(data), "max_seq_len": 64, **over},
            "train": {"checkpoint": {"output_dir": str(folder)}},
        }
        (folder / "config.resolved.yaml").write_text(yaml.safe_dump(settings))
        if has_assets:
            shutil.copytree(model, folder / "model_assets")
        return folder

    return write_run


def text_of(sample):
    return "".join(piece.text for _, pieces in sample.parts for piece in pieces)


def test_samples_show_what_is_trained(write, tmp_path):
    data = write_conversations(tmp_path / "a.jsonl", 9)
    (shared,) = show_samples(read_runs([write("run", data)]), 2)
    assert (shared.runs, shared.problem) == (("run",), None)
    assert [sample.heading.split(";")[0] for sample in shared.samples] == [
        f"sample 1: train, {data}:1",
        f"sample 2: train, {data}:2",
    ]
    assert "assistant" in text_of(shared.samples[0])
    weights = {piece.weight for _, pieces in shared.samples[0].parts for piece in pieces}
    assert weights == {0.0, 1.0}


def test_nothing_is_prepared_for_them(write, tmp_path):
    show_samples(read_runs([write("run", write_conversations(tmp_path / "a.jsonl", 9))]), 1)
    assert not (tmp_path / "cache").exists()


def test_runs_of_the_same_data_share_their_samples(write, tmp_path):
    one = write_conversations(tmp_path / "a.jsonl", 9)
    other = write_conversations(tmp_path / "b.jsonl", 9, seed=1)
    runs = read_runs([write("x", one), write("y", other), write("z", one)])
    assert [shared.runs for shared in show_samples(runs, 1)] == [("x", "z"), ("y",)]


def test_samples_come_from_every_source(write, tmp_path):
    names = ["docs", "chat"]
    paths = [str(write_conversations(tmp_path / f"{name}.jsonl", 5)) for name in names]
    schedule = [{"schedule_type": "const", "weights": [0.5, 0.5]}]
    mixture = {"sources": paths, "names": names, "schedule": schedule}
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump(mixture))
    (shared,) = show_samples(read_runs([write("run", tmp_path / "mix.yaml")]), 3)
    assert shared.problem is None
    assert [sample.origin.source for sample in shared.samples] == ["docs", "docs", "chat"]
    assert [sample.number for sample in shared.samples] == [1, 2, 3]


def test_data_that_is_gone_is_told(write, tmp_path):
    (shared,) = show_samples(read_runs([write("run", tmp_path / "gone.jsonl")]), 2)
    assert shared.samples == ()
    assert "data.train_path" in (shared.problem or "")
    assert "gone.jsonl" in (shared.problem or "")


def test_a_model_that_is_gone_does_not_matter_where_the_run_has_its_files(write, tmp_path, model):
    data = write_conversations(tmp_path / "a.jsonl", 3)
    folder = write("run", data, has_assets=True)
    file = folder / "config.resolved.yaml"
    file.write_text(file.read_text().replace(str(model), "/gone/model"))
    (shared,) = show_samples(read_runs([folder]), 1)
    assert shared.problem is None
    shutil.rmtree(folder / "model_assets")
    (shared,) = show_samples(read_runs([folder]), 1)
    assert "/gone/model" in (shared.problem or "")


def test_bad_records_are_passed_over(write, tmp_path):
    file = tmp_path / "bad.jsonl"
    bad = write_bad_records(file, good_each=1)
    (shared,) = show_samples(read_runs([write("run", file)]), 50)
    assert shared.problem is None
    assert [sample.origin.row for sample in shared.samples] == [row - 1 for row in bad]


def test_data_without_a_sample_is_told(write, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"messages": []}\n')
    (shared,) = show_samples(read_runs([write("run", tmp_path / "a.jsonl")]), 2)
    assert shared.problem == "the first 100 records of each source give no sample"


def test_records_that_are_not_tokenised_are_told(write, tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n")
    folder = write("run", tmp_path / "a.jsonl", task="DiffusionModule", data_type="diffusion")
    (shared,) = show_samples(read_runs([folder]), 2)
    assert "not tokenised" in (shared.problem or "")


def test_a_configuration_that_is_missing_or_asks_for_a_secret_is_told(write, tmp_path, monkeypatch):
    data = write_conversations(tmp_path / "a.jsonl", 3)
    secret = write("secret", "${oc.env:NO_SUCH_VARIABLE}")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "metrics.jsonl").touch()
    runs = read_runs([secret, tmp_path / "bare", write("good", data)])
    first, second, third = show_samples(runs, 1)
    assert "NO_SUCH_VARIABLE" in (first.problem or "")
    assert second.problem == "config.resolved.yaml is missing"
    assert third.problem is None
