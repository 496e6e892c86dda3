"""The files of a checkpoint of which one part is trained, and the others are carried over.

Qwen's omni models lie on the hub whole: a thinker, which is what is trained, a talker and what
turns its codes into sound. An export has all of them again, so that whatever loads the model that
training started from loads the export.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME
from transformers.utils.hub import cached_file

from omnilit.models.stored_weights import weight_files

PARTS: Final = ("thinker",)  # as tensors and configurations of wholes name what is trained
BESIDE: Final = (GENERATION_CONFIG_NAME, "spk_dict.pt")  # the voices, without which none loads
_TYPES: Final = ("dtype", "torch_dtype")


@dataclass(frozen=True, slots=True)
class WholeFiles:
    """The files of an export of a whole checkpoint.

    Args:
        source: Folder or hub name that training started from.
        part: The name in front of the trained tensors.
    """

    source: str
    part: str

    def write(self, folder: Path, tensors: Mapping[str, Tensor], *, num_parameters: int) -> None:
        """Write every tensor of the part into the file where it was, the others as they were.

        Args:
            folder: Exists, with what the part alone has.
            tensors: As `exported_tensors` gives them.
            num_parameters: Of the part.

        Raises:
            OSError: A file cannot be read or written.
        """
        left = {f"{self.part}.{name}": tensor for name, tensor in tensors.items()}
        dtype = next(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
        paths = [Path(path) for path in weight_files(self.source)]
        places: dict[str, str] = {}
        total = 0
        for path in paths:
            shard, others = self._shard(path, left)
            if path == paths[-1]:  # what the source has no file for
                shard |= left
            num_parameters += others
            save_file(
                {name: tensor.contiguous() for name, tensor in shard.items()},
                folder / path.name,
                metadata={"format": "pt"},
            )
            places |= dict.fromkeys(shard, path.name)
            total += sum(tensor.nbytes for tensor in shard.values())
        if len(paths) > 1:
            index = {
                "metadata": {"total_parameters": num_parameters, "total_size": total},
                "weight_map": dict(sorted(places.items())),
            }
            _write_json(folder / SAFE_WEIGHTS_INDEX_NAME, index)
        self._write_beside(folder, str(dtype).removeprefix("torch."))

    def _shard(self, path: Path, left: dict[str, Tensor]) -> tuple[dict[str, Tensor], int]:
        """The tensors of one file, those of the part taken from `left`, and how many others."""
        shard: dict[str, Tensor] = {}
        others = 0
        with safe_open(path, framework="pt", device="cpu") as stored:
            for name in stored.keys():  # noqa: SIM118 - it is no dict
                if name in left:
                    shard[name] = left.pop(name)
                elif not name.startswith(f"{self.part}."):
                    shard[name] = stored.get_tensor(name)
                    others += shard[name].numel()
        return shard, others

    def _write_beside(self, folder: Path, dtype: str) -> None:
        """The configuration of the whole, and what is loaded with it."""
        config = json.loads(Path(_file(self.source, CONFIG_NAME)).read_text(encoding="utf-8"))
        for part in (config, config[_key(self.part)]):
            for name in set(_TYPES) & part.keys():
                part[name] = dtype
        _write_json(folder / CONFIG_NAME, config)
        for name in BESIDE:
            if found := _file(self.source, name):
                shutil.copyfile(found, folder / name)


def find_whole_files(model_path: str | None) -> WholeFiles | None:
    """The files of an export that is to be whole again; None where the source is no whole.

    Args:
        model_path: Where training starts from.
    """
    path = None if model_path is None else _file(model_path, CONFIG_NAME)
    if model_path is None or not path:
        return None
    raw = json.loads(Path(path).read_text(encoding="utf-8"))
    for part in PARTS:
        if isinstance(raw.get(_key(part)), dict):
            return WholeFiles(model_path, part)
    return None


def _key(part: str) -> str:
    return f"{part}_config"


def _file(source: str, name: str) -> str:
    """A file of a folder or of the hub's cache; empty where there is none."""
    local = Path(source).expanduser()
    if local.exists():
        return str(local / name) if (local / name).is_file() else ""
    found = cached_file(
        source,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return found or ""


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
