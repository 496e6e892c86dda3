"""Make a small training set from the documentation inside the running Python interpreter.

The text is what `help()` shows for a list of standard library modules, turned into questions and
answers. Written to `--out`: `train.jsonl`, `eval.jsonl` (for some symbols a question whose wording
was never trained for them), `pairs/` with the same questions and beside each right answer that of
another symbol, `classes/` with what some modules say of their symbols and which module it is, whose
name is masked, and `model/` with a byte-level BPE tokenizer trained on the text, its chat template,
and the `config.json` of a small Qwen3. The same interpreter gives the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import re
import types
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config

# Importing any of these has no effect that a user could notice.
MODULES = (
    "bisect", "builtins", "copy", "functools", "glob", "heapq", "itertools", "json", "math",
    "os.path", "pathlib", "random", "re", "shutil", "textwrap", "time",
)  # fmt: skip

# Those to tell apart by what is said of their symbols: of these there are many
CLASSES = (
    "ast", "asyncio", "collections", "datetime", "decimal", "logging", "math", "pathlib",
    "random", "socket", "statistics", "threading",
)  # fmt: skip

MAX_ANSWER = 200  # characters
MAX_TEXT = 400  # likewise, of a text to classify
MASK = "___"
EVAL_ONE_IN = 5  # symbols
VOCAB_SIZE = 2048
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

QUESTIONS = {
    "module": ("What is the {0} module for?", "What does {0} do?", "What is {0}?"),
    "class": ("What is {0}?", "What does {0} do?", "Explain {0}."),
    "function": ("What does {0} do?", "Explain {0}.", "What is {0} for?"),
}

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{% generation %}{{- message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{{- '\\n' }}"
    "{%- else %}"
    "{{- message['content'] + '<|im_end|>\\n' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


Labelled = dict[str, str]
Conversation = dict[str, list[dict[str, str]]]  # also a pair of them, by their names


@dataclass(frozen=True, slots=True)
class Entry:
    """One documented symbol.

    Args:
        name: As one would write it after importing the module, such as `json.dumps`.
        kind: A key of QUESTIONS.
        answer: The beginning of its documentation, in whole sentences.
    """

    name: str
    kind: str
    answer: str


def summarize(doc: str, *, limit: int = MAX_ANSWER) -> str:
    """The first paragraphs of `doc` on one line, cut at the end of a sentence.

    Returns:
        At most `limit` characters; empty where not even the first sentence fits or it is no
        sentence (a bare signature, a heading).
    """
    text = ""
    for paragraph in re.split(r"\n\s*\n", doc.strip()):
        if re.match(r"\s*(>>>|[-*=+|]|\w+\(.*\)\s*(->.*)?$)", paragraph):
            break  # an example, a table or a signature: prose ends here
        for sentence in re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split())):
            if not sentence.endswith((".", "!", "?")) or len(text) + len(sentence) >= limit:
                return text
            text = f"{text} {sentence}".lstrip()
    return text


def find_entries(module_names: Iterable[str]) -> list[Entry]:
    """Every documented module, class and function, once each, sorted by name."""
    entries: dict[str, Entry] = {}
    seen_answers: set[str] = set()
    for module_name in sorted(module_names):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated names warn when they are touched
            module = import_module(module_name)
            for name, kind, target in _documented(module, module_name):
                answer = summarize(inspect.getdoc(target) or "")
                if len(answer) >= 20 and answer not in seen_answers:
                    seen_answers.add(answer)  # an alias repeats another's words
                    entries[name] = Entry(name, kind, answer)
    return [entries[name] for name in sorted(entries)]


def _documented(module: types.ModuleType, name: str) -> Iterator[tuple[str, str, object]]:
    """Each public symbol of a module as (name, kind, object)."""
    yield name, "module", module
    prefix = "" if name == "builtins" else f"{name}."
    public = getattr(module, "__all__", None) or [n for n in vars(module) if n[0] != "_"]
    for short in sorted(set(public)):
        target = vars(module).get(short)
        if inspect.isclass(target) and not issubclass(target, BaseException):
            yield prefix + short, "class", target
        elif inspect.isroutine(target):
            yield prefix + short, "function", target


def is_held_out(name: str) -> bool:
    """True for the symbols of which one question is kept for evaluation; the name decides."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4], "big") % EVAL_ONE_IN == 0


def split_questions(entries: Iterable[Entry]) -> tuple[list[Conversation], list[Conversation]]:
    """Conversations to train on, and those of another wording to evaluate on."""
    train, evaluate = [], []
    for entry in entries:
        *first, last = (to_conversation(entry, question) for question in QUESTIONS[entry.kind])
        train += first
        (evaluate if is_held_out(entry.name) else train).append(last)
    return train, evaluate


def to_conversation(entry: Entry, question: str) -> Conversation:
    """One record in the format of `data.data_type: conversation`."""
    return {
        "messages": [
            {"role": "user", "content": question.format(entry.name)},
            {"role": "assistant", "content": entry.answer},
        ]
    }


def to_pairs(conversations: Sequence[Conversation]) -> list[Conversation]:
    """Preference pairs: each conversation, and its question with another symbol's answer."""
    answers = sorted({talk["messages"][1]["content"] for talk in conversations})
    pairs = []
    for talk in conversations:
        question, answer = talk["messages"]
        digest = hashlib.sha256(question["content"].encode()).digest()
        place = int.from_bytes(digest[:4], "big") % (len(answers) - 1)
        others = [text for text in answers if text != answer["content"]]
        wrong = {"role": "assistant", "content": others[place]}
        pairs.append({"chosen": [question, answer], "rejected": [question, wrong]})
    return pairs


def find_texts(module_name: str) -> dict[str, str]:
    """What a module says of itself, its functions, classes and their methods, by symbol.

    Without words that begin with the module's own name, and no text twice.
    """
    module = import_module(module_name)
    own_words = re.compile(rf"(?<![a-z]){re.escape(module_name)}[a-z]*", re.IGNORECASE)
    texts: dict[str, str] = {}
    for name, kind, target in _documented(module, module_name):
        own = [(name, target)]
        if kind == "class":
            methods = sorted(vars(target).items())
            own += [(f"{name}.{key}", value) for key, value in methods if key[0] != "_"]
        for symbol, value in own:
            is_code = inspect.isclass(value) or inspect.ismodule(value) or callable(value)
            text = " ".join((inspect.getdoc(value) or "").split()) if is_code else ""
            masked = own_words.sub(MASK, text)[:MAX_TEXT]
            if len(masked) >= 40 and masked not in texts.values():
                texts[symbol] = masked
    return texts


def split_texts(module_names: Iterable[str]) -> tuple[list[Labelled], list[Labelled]]:
    """Texts with their module to train on, and those of other symbols to evaluate on."""
    train: list[Labelled] = []
    evaluate: list[Labelled] = []
    for label in sorted(module_names):
        for symbol, text in find_texts(label).items():
            part = evaluate if is_held_out(symbol) else train
            part.append({"text": text, "label": label})
    return train, evaluate


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most VOCAB_SIZE entries, with the chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def make_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    """A Qwen3 small enough to learn on two CPU cores in a few minutes."""
    vocabulary = tokenizer.get_vocab()
    return Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        architectures=["Qwen3ForCausalLM"],
        bos_token_id=None,
        eos_token_id=vocabulary[END],
        pad_token_id=vocabulary[PAD],
    )


def write_dataset(out: Path, module_names: Iterable[str]) -> dict[str, int]:
    """Write everything to `out`, replacing what an earlier run left.

    Returns:
        How many conversations, pairs of them or texts each file got.
    """
    train, evaluate = split_questions(find_entries(module_names))
    for folder in ("pairs", "classes"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    parts: dict[str, Sequence[object]] = {"train.jsonl": train, "eval.jsonl": evaluate}
    parts |= {"pairs/train.jsonl": to_pairs(train), "pairs/eval.jsonl": to_pairs(evaluate)}
    names = ("classes/train.jsonl", "classes/eval.jsonl")
    parts |= dict(zip(names, split_texts(CLASSES), strict=True))
    for file_name, part in parts.items():
        lines = [json.dumps(record, ensure_ascii=False) for record in part]
        (out / file_name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    texts = [message["content"] for item in train for message in item["messages"]]
    tokenizer = train_tokenizer(texts)
    tokenizer.save_pretrained(out / "model")
    make_config(tokenizer).save_pretrained(out / "model")
    return {file_name: len(part) for file_name, part in parts.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    out = parser.parse_args(argv).out
    for file_name, count in write_dataset(out, MODULES).items():
        what = {"pairs": "pairs", "classes": "texts"}.get(Path(file_name).parts[0], "conversations")
        print(f"{out / file_name}: {count} {what}")
    print(f"{out / 'model'}: tokenizer and model configuration")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
