"""Which tensor of an export lies in which file, as an index of safetensors shards says it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME
from transformers.utils.hub import cached_file

from omnilit.errors import ConfigError
from omnilit.logging import get_logger
from omnilit.models.weight_report import listed

KEY: Final = "model.safetensor_idx_path"
FIX: Final = (
    "give the model.safetensors.index.json of a model of this architecture, or leave it out"
)
SUFFIX: Final = ".safetensors"
log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ShardFiles:
    """The files of an export.

    Args:
        path: The index.
        files: Name of each tensor, as files have it, to the file that it lies in.
    """

    path: Path
    files: Mapping[str, str]

    def lacking(self, names: set[str]) -> list[str]:
        """Tensors of an export that the index has no file for."""
        return sorted(names - self.files.keys())

    def write(self, folder: Path, tensors: Mapping[str, Tensor], *, num_parameters: int) -> None:
        """Write every tensor into its file, and the index of those that are there.

        Args:
            folder: Exists.
            tensors: As `exported_tensors` gives them, all of them with a file.
            num_parameters: Of the model, for the index; saved buffers are none.

        Raises:
            OSError: A file cannot be written.
        """
        members: dict[str, list[str]] = {}
        for name in tensors:
            members.setdefault(self.files[name], []).append(name)
        for file in sorted(members):
            shard = {name: tensors[name].contiguous() for name in members[file]}
            save_file(shard, folder / file, metadata={"format": "pt"})
        totals = {
            "total_parameters": num_parameters,
            "total_size": sum(tensor.nbytes for tensor in tensors.values()),
        }
        index = {
            "metadata": totals,
            "weight_map": {name: self.files[name] for name in sorted(tensors)},
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")


def exported_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors of a model in the layout of files on the hub: experts apart, tied ones once.

    Args:
        model: Whole; on the meta device it tells names and shapes.
    """
    ignored = model._keys_to_ignore_on_save or ()  # noqa: SLF001  # pyright: ignore[reportPrivateUsage] - as save_pretrained does
    saved = {name: t for name, t in model.state_dict().items() if name not in ignored}
    return revert_weight_conversion(model, remove_tied_weights_from_state_dict(saved, model))


def find_shard_files(
    index_path: str | None, model_path: str | None, build: Callable[[], PreTrainedModel]
) -> ShardFiles | None:
    """The files that an export of a model is to have.

    Args:
        index_path: `model.safetensor_idx_path`.
        model_path: Where training starts from; its own index counts where none is named.
        build: Makes the model on the meta device.

    Returns:
        None where there is no index: transformers then chooses the files.

    Raises:
        ConfigError: The index that was named cannot be read, or lacks tensors of the model.
    """
    path = Path(index_path).expanduser() if index_path else _own_index(model_path)
    if path is None:
        return None
    shards = ShardFiles(path, _read_index(path))
    names = exported_tensors(build()).keys()
    if lacking := shards.lacking(set(names)):
        problem = f"{path} has no file for {listed(lacking)}"
        if index_path:
            raise ConfigError(key=KEY, problem=problem, fix=FIX)
        log.warning("%s: %s; exports get files of another layout", KEY, problem)
        return None
    if others := sorted(shards.files.keys() - names):
        log.info("%s: %s names %s, which the model does not save", KEY, path, listed(others))
    return shards


def _own_index(model_path: str | None) -> Path | None:
    if model_path is None:
        return None
    local = Path(model_path).expanduser()
    name = str(local) if local.exists() else model_path
    found = cached_file(
        name,
        SAFE_WEIGHTS_INDEX_NAME,
        local_files_only=True,  # what was not downloaded with the weights is not there
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return Path(found) if found else None


def _read_index(path: Path) -> dict[str, str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        files = dict(content["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"no weight_map in it: {error}"
        raise ConfigError(key=KEY, problem=f"{path} cannot be read ({reason})", fix=FIX) from error
    strange = [file for file in files.values() if not _is_file_name(file)]
    if strange or not files:
        what = f"names the file {strange[0]!r}" if strange else "names no tensor"
        raise ConfigError(key=KEY, problem=f"{path} {what}", fix=FIX)
    return files


def _is_file_name(file: object) -> bool:
    """Whether it is a file beside the index, and not a path to anywhere."""
    return isinstance(file, str) and file.endswith(SUFFIX) and Path(file).name == file
