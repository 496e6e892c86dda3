from omnilit.tools.report.panels import build_frame, build_sections
from omnilit.tools.report.runs import read_run
from tests.helpers.runs import step_line, write_lines, write_run


def titles(runs):
    return {s.title: [chart.title for chart in s.charts] for s in build_sections(runs)}


def test_known_numbers_come_first_and_each_has_its_chart(tmp_path):
    run = read_run(write_run(tmp_path / "a", numbers={"mfu": 0.4}), "a")
    assert titles([run]) == {
        "Training": [
            "Loss", "Evaluation loss", "Learning rate", "Gradient norm", "Throughput", "Step time",
            "Data wait", "Memory, largest rank", "Model FLOPs utilisation", "Supervised tokens",
        ]
    }  # fmt: skip


def test_terms_sources_groups_and_other_numbers_have_sections_of_their_own(tmp_path):
    numbers = {
        "source/a/b/loss": 1.0,
        "source/a/b/tokens": 5,
        "loss/lm": 1.0,
        "loss/aux": 0.1,
        "eval_loss/chat": 2.0,
        "eval_aux": 0.1,
        "lr/head": 1e-4,
        "grad_norm/layers.0": 0.5,
        "reward/margin": 0.5,
        "my_number": 3.0,
    }
    found = titles([read_run(write_run(tmp_path / "a", numbers=numbers), "a")])
    del found["Training"]
    assert found == {
        "Loss by term": ["Loss: aux", "Loss: lm"],
        "Evaluation loss by source": ["Evaluation loss: chat"],
        "Data sources": ["Loss: a/b", "Supervised tokens: a/b"],
        "Learning rate by group": ["Learning rate: backbone", "Learning rate: head"],
        "Gradient norm by part": ["Gradient norm: layers.0"],
        "Evaluation": ["eval_aux"],
        "Other numbers": ["my_number"],
        "reward": ["reward/margin"],
    }


def test_only_runs_that_have_a_number_are_in_its_chart(tmp_path):
    plain = read_run(write_run(tmp_path / "a"), "a")
    with_mfu = read_run(write_run(tmp_path / "b", numbers={"mfu": 0.4}), "b")
    (training,) = build_sections([plain, with_mfu])
    curves = {chart.title: [curve.run for curve in chart.curves] for chart in training.charts}
    assert curves["Loss"] == [0, 1]
    assert curves["Model FLOPs utilisation"] == [1]


def test_a_number_that_is_never_finite_and_no_skipped_step_have_no_chart(tmp_path):
    run = read_run(write_run(tmp_path / "a", numbers={"grad_norm": None}), "a")
    assert not {"Gradient norm", "Skipped steps"} & set(titles([run])["Training"])
    run = read_run(write_run(tmp_path / "b", numbers={"skipped_steps": 2}), "b")
    assert "Skipped steps" in titles([run])["Training"]


def test_the_frame_holds_the_steps_of_all_runs(tmp_path):
    runs = [
        read_run(write_run(tmp_path / "a", 20), "a"),
        read_run(write_lines(tmp_path / "b" / "metrics.jsonl", [step_line(31)]).parent, "b"),
    ]
    frame = build_frame(runs, build_sections(runs))
    assert (frame.low, frame.high) == (1, 31)
    assert frame.windows == (5, 15)


def test_many_curves_are_drawn_more_coarsely(tmp_path):
    few = read_run(write_run(tmp_path / "a", 2), "a")
    numbers = {f"part/{i}": i for i in range(1000)}
    many = read_run(write_run(tmp_path / "b", 2, numbers=numbers), "b")
    assert build_frame([few], build_sections([few])).num_columns == 280
    assert build_frame([many], build_sections([many])).num_columns == 40


def test_a_run_without_a_step_has_no_section(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    runs = [read_run(tmp_path, "a")]
    assert build_sections(runs) == []
    assert build_frame(runs, []).limits(0.5) == (-0.5, 0)
