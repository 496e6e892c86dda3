import io
import sys
from typing import cast

import pytest

from omnilit.config import InferArguments
from omnilit.errors import ConfigError, DataError
from omnilit.tools import infer
from omnilit.tools.chat import Chat
from omnilit.tools.infer import find_model, hold_conversation, parse_request, run


def problems_of(*argv):
    with pytest.raises(ConfigError) as caught:
        parse_request(argv)
    return [str(problem) for problem in caught.value.problems]


def test_flags_become_arguments():
    request = parse_request(
        ["--infer.model_path", ".", "--infer.do_sample", "false", "--infer.temperature=1e-1"]
    )
    assert request.arguments == InferArguments(".", do_sample=False, temperature=0.1)
    assert request.prompt is None


def test_flags_win_over_the_file_whose_other_groups_are_left_alone(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("train: {seed: 1}\ninfer: {model_path: .,  seed: 1, max_tokens: 5}\n")
    request = parse_request(["--config", str(file), "--infer.seed", "2"])
    assert request.arguments == InferArguments(".", seed=2, max_tokens=5)


@pytest.mark.parametrize("text", ["a: b", "12", "--what?", "[x"])
def test_prompt_is_taken_as_typed(text):
    assert parse_request(["--infer.model_path", ".", "--prompt", text]).prompt == text
    assert parse_request([f"--prompt={text}", "--infer.model_path", "."]).prompt == text


def test_all_mistakes_are_told_together():
    found = problems_of(
        *("--infer.seed", "x", "--infer.top_q", "1", "--infer.max_tokens", "0", "--other.a", "1")
    )
    assert [line.partition(":")[0] for line in found] == [
        "infer.seed",
        "infer.top_q",
        "other",
        "infer.max_tokens",
        "infer.model_path",
    ]


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("temperature", "-0.1"),
        ("top_p", "0.0"),
        ("top_p", "1.1"),
        ("max_tokens", "0"),
        ("seed", "-1"),
    ],
)
def test_value_out_of_range_is_refused(flag, value):
    (found,) = problems_of("--infer.model_path", ".", f"--infer.{flag}", value)
    assert found.startswith(f"infer.{flag}: {value} is out of range. To fix: use a number ")


def test_model_is_required():
    assert problems_of() == [
        "infer.model_path: no model is given. To fix: name the folder of a trained model."
    ]


def test_absent_folder_is_refused(tmp_path):
    (found,) = problems_of("--infer.model_path", str(tmp_path / "gone"))
    assert "infer.model_path" in found
    assert "gone does not exist" in found


def test_missing_environment_variable_is_one_problem():
    (found,) = problems_of("--infer.model_path", "${oc.env:NO_SUCH_VARIABLE}")
    assert found.startswith("infer.model_path: '${oc.env:NO_SUCH_VARIABLE}' cannot be resolved")


def test_prompt_without_text_is_refused():
    assert problems_of("--prompt")[0].startswith("--prompt: has no text.")


def test_model_folder_is_taken_as_it_is(tmp_path):
    (tmp_path / "config.json").touch()
    assert find_model(str(tmp_path)) == str(tmp_path)


def test_run_folder_gives_its_newest_complete_export(tmp_path):
    for step in (9, 10):
        export = tmp_path / "checkpoints" / f"global_step_{step}" / "hf_ckpt"
        export.mkdir(parents=True)
        (export / "COMPLETE").touch()
    (tmp_path / "checkpoints" / "global_step_11" / "hf_ckpt").mkdir(parents=True)
    assert find_model(str(tmp_path)) == str(tmp_path / "checkpoints/global_step_10/hf_ckpt")


def test_run_without_complete_export_is_refused(tmp_path):
    (tmp_path / "checkpoints" / "global_step_11" / "hf_ckpt").mkdir(parents=True)
    with pytest.raises(ConfigError, match="has no complete Hugging Face export"):
        find_model(str(tmp_path))


def test_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"is not a model folder: it has no config\.json"):
        find_model(str(tmp_path))


def test_name_without_a_folder_is_left_to_the_hub():
    assert find_model("no-such-org/no-such-model") == "no-such-org/no-such-model"


class Parrot:
    """Answers with how much it was told so far."""

    def __init__(self, out):
        self.out, self.messages = out, []

    def ask(self, text):
        if text == "long":
            raise DataError(problem="too long", fix="say less")
        self.messages.append(text)
        self.out.write(f"{len(self.messages)} {text}\n")


def talk(*lines):
    out = io.StringIO()
    hold_conversation(
        cast("Chat", Parrot(out)), io.StringIO("".join(f"{line}\n" for line in lines)), out
    )
    return out.getvalue().replace("> ", "").splitlines()[1:]


def test_clear_forgets_and_exit_ends():
    assert talk("a", "", "b", "clear", "c", "exit", "d") == ["1 a", "2 b", "(forgotten)", "1 c"]


def test_chat_ends_with_its_input():
    assert talk("a") == ["1 a"]


def test_too_long_line_does_not_end_the_chat():
    assert talk("a", "long", "b") == ["1 a", "too long. To fix: say less.", "2 b"]


def test_run_answers_one_prompt(model_folder, capsys):
    argv = ["--infer.model_path", str(model_folder), "--infer.max_tokens", "4"]
    assert run([*argv, "--prompt", "hi"]) == 0
    first = capsys.readouterr()
    assert run([*argv, "--prompt", "hi"]) == 0
    assert capsys.readouterr().out == first.out != ""
    assert first.err == f"model: {model_folder}\n"


def test_settings_of_media_are_refused_for_a_model_of_text(model_folder):
    argv = ["--infer.model_path", str(model_folder), "--infer.mm_configs", "{fps: 4}"]
    with pytest.raises(ConfigError, match=r"infer\.mm_configs: the model in .* has no processor"):
        run([*argv, "--prompt", "hi"])


def test_run_without_prompt_chats(model_folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\nexit\n"))
    assert run(["--infer.model_path", str(model_folder), "--infer.max_tokens", "4"]) == 0
    assert capsys.readouterr().out.count("> ") == 2


def test_help_lists_every_field(capsys):
    assert run(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(
        f"--{field.path}" in text for field in infer.dataclass_fields(InferArguments, "infer")
    )
