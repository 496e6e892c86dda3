"""`omnilit infer`: chat with a model in the Hugging Face layout, answer one prompt, or a file."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, TextIO

from omnilit.checkpoint.layout import HF_FOLDER, checkpoints_folder, step_of
from omnilit.checkpoint.manifest import COMPLETE
from omnilit.cli.imports import IMPORTS, import_given
from omnilit.cli.raw import merge, read_command
from omnilit.config import InferArguments
from omnilit.config.check import check_values
from omnilit.config.coerce import describe
from omnilit.config.machine_checks import check_paths
from omnilit.config.rules import run_rules
from omnilit.config.schema import Field, dataclass_fields
from omnilit.config.view import View
from omnilit.errors import ConfigError, DataError
from omnilit.logging import format_table
from omnilit.tools.file_request import FileRequest

if TYPE_CHECKING:
    from omnilit.tools.chat import Chat

# Groups of a YAML file that `infer` does not read
OTHER_VERBS: Final = ("model", "data", "train", "dpo_config", "trainer")
MEDIA: Final = ("image", "video", "audio")  # as in `types.MODALITIES`, without importing torch
# What this verb takes beside settings, and what to write after each
FLAGS: Final[Mapping[str, str]] = {
    "--prompt": "it in quotes",
    **{f"--{kind}": "a file" for kind in MEDIA},
    "--input": "a file of records",
    "--output": "a file to write",
    "--batch-size": "a number",
    "--logprobs": "nothing",
}
USAGE: Final = """\
usage: omnilit infer [FILE.yaml] [--prompt TEXT [--image FILE] [--video FILE] [--audio FILE]]
                     --infer.model_path PATH [--infer.KEY VALUE ...]
       omnilit infer [FILE.yaml] --input FILE --output FILE [--batch-size N] [--logprobs]
                     --infer.model_path PATH [--infer.KEY VALUE ...]

Answers TEXT, or chats: 'clear' forgets what was said, 'exit' ends. PATH is a model folder, the
output folder of a run, of which the newest complete export answers, or a name on the hub.
--image, --video and --audio may be given several times: each file takes the next <image>, <video>
or <audio> of TEXT; where TEXT has none of a kind, they come before it.

With --input each record with "messages" or "prompt" is written to --output with its "completion",
with --logprobs also the log-probability of each token. The same command goes on where it stopped.
"""


@dataclass(frozen=True, slots=True)
class Request:
    """What the command line asks for.

    Args:
        arguments: The fields of `infer`, from file and flags.
        prompt: The one prompt to answer; None for a chat.
        file: The records to answer; None where there is no `--input`.
        media: Files beside the prompt, by their kind.
    """

    arguments: InferArguments
    prompt: str | None
    file: FileRequest | None = None
    media: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def run(argv: Sequence[str]) -> int:
    """Answer one prompt or chat; returns the exit code.

    Raises:
        ConfigError: Settings are wrong; with all their problems.
        CheckpointError: The model cannot be loaded.
        DataError: The prompt does not fit the model.
    """
    if {"-h", "--help"} & set(argv):
        sys.stdout.write(help_text())
        return 0
    request = parse_request(argv)
    model = find_model(request.arguments.model_path)
    sys.stderr.write(f"model: {model}\n")
    # imported only now: a wrong setting is told at once, without waiting for transformers
    from omnilit.tools.chat import open_chat
    from omnilit.tools.host import best_machine

    chat = open_chat(request.arguments, model, best_machine().device, sys.stdout)
    if request.file is not None:
        from omnilit.tools.infer_file import answer_file

        answer_file(request.file, chat)
        return 0
    if request.prompt is not None:
        check_kinds(request.media, chat)
        chat.ask(request.prompt, {f"{kind}s": list(files) for kind, files in request.media.items()})
        return 0
    hold_conversation(chat, sys.stdin, sys.stdout)
    return 0


def help_text() -> str:
    """Usage and the fields of `infer`."""
    rows = [
        (
            f"--{f.path}",
            describe(f.annotation),
            "required" if f.required else f.default,
            f.description,
        )
        for f in _fields()
    ]
    table = format_table("settings:", ("setting", "type", "default", "meaning"), rows)
    return f"{USAGE}\n{table}\n"


def parse_request(argv: Sequence[str]) -> Request:
    """Read flags and file; flags win.

    Raises:
        ConfigError: Unknown flags or keys, wrong values, no model; all of them together.
    """
    words, flags, media = _take_flags(argv)
    file = _read_file_flags(flags)
    if media and "--prompt" not in flags:
        problem, fix = "acts with --prompt", "ask something about the file: --prompt TEXT"
        raise ConfigError(key=f"--{next(iter(media))}", problem=problem, fix=fix)
    raw = import_given(merge(read_command(words), _fields()))
    checked = check_values(raw.resolved, _fields(), others=OTHER_VERBS)
    view = View.of(checked, _fields(), verb="infer")
    doubtful = checked.doubtful | {problem.key for problem in raw.problems}
    paths = [problem for problem in check_paths(view) if problem.key not in doubtful]
    problems = [*raw.problems, *checked.problems, *run_rules(view, doubtful=doubtful), *paths]
    if problems:
        raise ConfigError.of(problems)
    arguments = InferArguments(**checked.values["infer"])
    return Request(arguments, flags.get("--prompt"), file, media)


def check_kinds(kinds: Iterable[str], chat: Chat) -> None:
    """See that the model takes media of these kinds.

    Raises:
        ConfigError: It does not.
    """
    taken = [] if chat.reader.media is None else list(chat.reader.media.tokens)
    if other := next((kind for kind in kinds if kind not in taken), None):
        known = f"takes {' and '.join(f'{kind}s' for kind in taken)}" if taken else "reads text"
        problem = f"{chat.arguments.model_path} {known} alone"
        fix = f"leave it out, or name a model that takes {other}s, with its processor"
        raise ConfigError(key=f"--{other}", problem=problem, fix=fix)


def find_model(path: str) -> str:
    """The model that `path` stands for.

    Args:
        path: A folder in the Hugging Face layout; a run's output folder, whose complete export of
            the highest step is taken; or, where there is no such folder, a name on the hub.

    Raises:
        ConfigError: A folder that is neither of the two.
    """
    folder = Path(path).expanduser()
    if not folder.exists():
        return path
    if any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        return str(folder)
    key = "infer.model_path"
    steps = checkpoints_folder(folder)
    if not steps.is_dir():
        raise ConfigError(
            key=key,
            problem=f"{path} is not a model folder: it has no config.json",
            fix="name a folder with config.json and safetensors files, or a run's output_dir",
        )
    exports = {
        step: entry / HF_FOLDER
        for entry in steps.iterdir()
        if (step := step_of(entry)) is not None and (entry / HF_FOLDER / COMPLETE).is_file()
    }
    if not exports:
        raise ConfigError(
            key=key,
            problem=f"the run in {path} has no complete Hugging Face export",
            fix="train with train.checkpoint.save_hf_weights: true, or make one of a checkpoint: "
            "omnilit export",
        )
    return str(exports[max(exports)])


def hold_conversation(chat: Chat, source: TextIO, out: TextIO) -> None:
    """Answer line after line of `source` until `exit` or its end."""
    out.write("'clear' forgets what was said, 'exit' ends.\n")
    while True:
        out.write("> ")
        out.flush()
        line = source.readline()
        text = line.strip()
        if not line or text == "exit":
            return
        if text == "clear":
            chat.messages.clear()
            out.write("(forgotten)\n")
        elif text:
            try:
                chat.ask(text)
            except DataError as error:  # too long: the chat goes on
                out.write(f"{error}\n")


def _fields() -> list[Field]:
    return [IMPORTS, *dataclass_fields(InferArguments, "infer")]


def _take_flags(
    argv: Sequence[str],
) -> tuple[list[str], dict[str, str], dict[str, tuple[str, ...]]]:
    """The other words; the flags of this verb as they were typed: text, not YAML; and the files."""
    others: list[str] = []
    flags: dict[str, str] = {}
    media: dict[str, tuple[str, ...]] = {}
    words = iter(argv)
    for word in words:
        flag, has_value, value = word.partition("=")
        if flag == "--logprobs":
            if has_value:
                fix = "write it alone, or leave it out"
                raise ConfigError(key=flag, problem=f"takes no value: {value!r}", fix=fix)
            flags[flag] = ""
        elif flag not in FLAGS:
            others.append(word)
        elif (text := value if has_value else next(words, "")) == "":
            raise ConfigError(key=flag, problem="has no text", fix=f"write {FLAGS[flag]} after it")
        elif (kind := flag.removeprefix("--")) in MEDIA:
            media[kind] = (*media.get(kind, ()), text)
        else:
            flags[flag] = text
    return others, flags, media


def _read_file_flags(flags: Mapping[str, str]) -> FileRequest | None:
    """What `--input` and its company ask for.

    Raises:
        ConfigError: One flag lacks those it belongs to, or a number is none.
    """
    source, output = flags.get("--input"), flags.get("--output")
    if source is None or output is None:
        for flag in ("--input", "--output", "--batch-size", "--logprobs"):
            if flag in flags:
                fix = "give both --input FILE and --output FILE, or leave it out"
                problem = "acts with --input and --output together"
                raise ConfigError(key=flag, problem=problem, fix=fix)
        return None
    if "--prompt" in flags:
        fix = "give one of the two"
        raise ConfigError(key="--prompt", problem="stands beside --input", fix=fix)
    size = flags.get("--batch-size", "16")
    if not size.isdecimal() or int(size) < 1:
        fix = "use a number at least 1"
        raise ConfigError(key="--batch-size", problem=f"{size!r} is no number of prompts", fix=fix)
    return FileRequest(source, Path(output), int(size), has_logprobs="--logprobs" in flags)
