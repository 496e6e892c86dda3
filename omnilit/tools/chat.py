"""A conversation with a model that plain transformers loads from a folder."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TextIO, cast

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
)
from transformers.utils.logging import (
    disable_progress_bar,
    enable_progress_bar,
    is_progress_bar_enabled,
)

from omnilit.config import InferArguments
from omnilit.data.messages import ASSISTANT, Conversation, Turn
from omnilit.data.records import to_question
from omnilit.errors import CheckpointError, ConfigError, DataError
from omnilit.models.architecture import part_of_whole, takes_media
from omnilit.models.build import stop_tokens
from omnilit.models.gpu_packages import without_fla
from omnilit.tools.questions import KEY, QuestionReader, open_reader
from omnilit.types import Origin, Record

ADAPTER_CONFIG: Final = "adapter_config.json"
BASE_NAME: Final = "base_model_name_or_path"


@dataclass(slots=True)
class Chat:
    """One model, and what was said to it so far.

    Args:
        model: In evaluation mode, on its device.
        reader: Writes what it is asked as its tokens.
        arguments: How tokens are chosen.
        out: Where the answers are written, word by word.
        messages: The history, oldest first.
    """

    model: PreTrainedModel
    reader: QuestionReader
    arguments: InferArguments
    out: TextIO
    messages: list[Turn] = field(default_factory=list)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Of the model."""
        return self.reader.tokenizer

    def ask(self, text: str, media: Mapping[str, Sequence[str]] | None = None) -> str:
        """Answer `text` in the light of the history, and add both to it.

        Args:
            text: The question.
            media: Files by the name of their column, such as `images`.

        Returns:
            The answer; it was also written to `out` as it came.

        Raises:
            DataError: History and text fill the model's context, or a file cannot be used; the
                history is as before.
        """
        record = Record({"prompt": text, **(media or {})}, Origin("prompt", "", 0))
        turns = [*self.messages, *to_question(record).turns]
        question = self.reader.read(Conversation(tuple(turns)), record)
        length = len(question)
        room = context_size(self.model) - length
        if room <= 0:
            raise DataError(
                problem=f"the prompt of {length} tokens leaves no room in the model's"
                f" context of {context_size(self.model)}",
                fix="ask something shorter, or forget the history with 'clear'",
            )
        device = self.model.device
        prompt = torch.from_numpy(question.input_ids).long()[None].to(device)
        loaded = self.reader.load(question, device)
        self.model.generation_config = self._choose(min(room, self.arguments.max_tokens))
        # the mix-in that has it is typed as a protocol that no model class meets
        generate: Callable[..., torch.Tensor] = cast("Any", self.model).generate
        with torch.inference_mode():
            tokens = generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                streamer=_Stream(self.tokenizer, self.out),
                **loaded,
            )
        answer = self.tokenizer.decode(tokens[0, length:], skip_special_tokens=True)
        self.messages = [*turns, Turn(ASSISTANT, cast("str", answer), 1.0)]
        return cast("str", answer)

    def _choose(self, max_new_tokens: int) -> GenerationConfig:
        """The fields of `infer` alone: what the folder's generation_config says is not read."""
        end = stop_tokens(self.model.generation_config, self.tokenizer)
        pad = self.tokenizer.pad_token_id
        common = {
            "max_new_tokens": max_new_tokens,
            "eos_token_id": end or None,
            "pad_token_id": end[0] if pad is None and end else pad,
        }
        if not self.arguments.do_sample or self.arguments.temperature == 0:
            return GenerationConfig(do_sample=False, **common)
        return GenerationConfig(
            do_sample=True,
            temperature=self.arguments.temperature,
            top_p=self.arguments.top_p,
            top_k=0,
            **common,
        )


class _Stream(TextStreamer):
    """Writes the answer as it grows, without the prompt."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, out: TextIO) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)  # pyright: ignore[reportArgumentType]
        self._out = out

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._out.write(text + ("\n" if stream_end else ""))
        self._out.flush()


def open_chat(arguments: InferArguments, path: str, device: str, out: TextIO) -> Chat:
    """Load model and tokenizer and seed the sampling.

    Args:
        arguments: The fields of `infer`.
        path: Folder of the model in the Hugging Face layout, or its name on the hub.
        device: Where it runs, such as `cpu`.
        out: Where the answers go.

    Raises:
        CheckpointError: A weight of the model is not in the folder, or a file cannot be read.
        ConfigError: The tokenizer cannot be read or has no chat template.
    """
    beside = arguments.tokenizer_path or path
    tokenizer = _load_tokenizer(beside)
    torch.manual_seed(arguments.seed)
    model = (_load_adapted(path) if is_adapter(path) else _load_model(path)).eval()
    reader = open_reader(
        beside,
        tokenizer,
        takes_media=takes_media(model.config),
        settings=arguments.mm_configs,
    )
    cast("torch.nn.Module", model).to(device)
    return Chat(model, reader, arguments, out)


def context_size(model: PreTrainedModel) -> int:
    """The longest sequence that the model's positions cover, in tokens."""
    return int(model.config.get_text_config().max_position_embeddings)


def _load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    try:
        # False, not left out: transformers would ask on the terminal whether to run foreign code
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            key=KEY,
            problem=f"no tokenizer can be read from {path} ({_first_line(error)})",
            fix="name the folder that holds tokenizer.json",
        ) from error
    return cast("PreTrainedTokenizerBase", tokenizer)


def _load_model(path: str) -> PreTrainedModel:
    try:
        with _hidden_progress(), without_fla():
            config = part_of_whole(AutoConfig.from_pretrained(path, trust_remote_code=False))
            kind = AutoModelForImageTextToText if takes_media(config) else AutoModelForCausalLM
            loaded: object = kind.from_pretrained(
                path,
                config=config,
                dtype="auto",
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: the model cannot be loaded ({_first_line(error)})."
            " To fix: name a folder with config.json and complete safetensors files."
        ) from error
    model, info = cast("tuple[PreTrainedModel, dict[str, list[str]]]", loaded)
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"{path}: {len(missing)} weights are missing, the first is {missing[0]}."
            " To fix: export the model again."
        )
    return model


def is_adapter(path: str) -> bool:
    """Whether a folder holds adapters of peft's and no model."""
    return (Path(path) / ADAPTER_CONFIG).is_file()


def _load_adapted(path: str) -> PreTrainedModel:
    """The model that adapters were trained beside, with them added to its matrices."""
    try:
        base = json.loads((Path(path) / ADAPTER_CONFIG).read_text("utf-8"))[BASE_NAME]
        from peft import PeftModel
    except (ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path}: {ADAPTER_CONFIG} names no model ({_first_line(error)})."
            " To fix: export the adapters again."
        ) from error
    except ImportError as error:
        raise CheckpointError(
            f"{path} holds adapters, and the package peft is not installed."
            " To fix: pip install 'omnilit[lora]', or make a whole model: omnilit export --merge."
        ) from error
    model = _load_model(base)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of patterns that peft itself has written
            adapted: Any = PeftModel.from_pretrained(cast("Any", model), path)
            return adapted.merge_and_unload()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: the adapters cannot be loaded ({_first_line(error)})."
            " To fix: export them again, or give the model that they were trained beside."
        ) from error


@contextmanager
def _hidden_progress() -> Iterator[None]:
    """No progress bar of transformers while a small file loads."""
    was_enabled = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            enable_progress_bar()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
