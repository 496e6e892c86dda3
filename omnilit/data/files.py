"""Which data a path means: files, folders, patterns, URLs, saved and hub data sets."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

from omnilit.config.hub import may_be_hub_data
from omnilit.errors import ConfigError, DataError, OmniError, Problem, suggest
from omnilit.registry import Registry

T = TypeVar("T")
TEXT_FORMATS: Final = ("jsonl", "json", "csv")
FORMATS: Final = (*TEXT_FORMATS, "parquet", "arrow")
COMPRESSIONS: Final = (".gz", ".zst")
ENDINGS: Final = (
    *(f".{name}" for name in FORMATS),
    *(f".{name}{end}" for name in TEXT_FORMATS for end in COMPRESSIONS),
)
SAVED: Final = ("state.json", "dataset_dict.json")  # in a folder of `save_to_disk`
NUM_SAMPLED, SAMPLED_BYTES = 64, 65_536  # pieces of a large file, its two ends among them
CUSTOM: Final = "custom:"
DATASETS: Final = "datasets"
STREAM: Final = "datasets stream"  # of the hub, read as it is downloaded

BUILT_IN_TYPES: Final = ("mapping", "iterable")
DATASET_TYPES: Final = Registry("data.datasets_type")


@dataclass(frozen=True, slots=True)
class DataFile:
    """Something that records are read from.

    Args:
        path: Of a file, a URL, a saved data set's folder, or the id of one on the hub; a split
            follows a #.
        format: One of `FORMATS`, `DATASETS`, `STREAM`, or `CUSTOM` and the target of a reader.
        key: The YAML path that names it, for messages.
    """

    path: str
    format: str
    key: str = field(default="", compare=False)

    @property
    def is_local(self) -> bool:
        """Whether it is one file of this machine."""
        return self.format in FORMATS and "://" not in self.path


def list_files(path: str, *, key: str, datasets_type: str = "mapping") -> list[DataFile]:
    """What a path means, in a fixed order.

    Args:
        path: Files, folders, patterns, URLs, saved data sets and hub ids, separated by commas.
            Of a folder the files with a known ending are taken, sorted by name; what else lies
            there is not data. A path with commas in it that exists as a whole is just that.
        key: The YAML path that `path` was given under, for messages.
        datasets_type: `package.module:Class`, or a name registered for one, hands the path to
            that reader.

    Raises:
        ConfigError: Lists every item that does not exist, has no data or has another ending.
    """
    if datasets_type not in BUILT_IN_TYPES:
        DATASET_TYPES.load(datasets_type)
        return [DataFile(path, CUSTOM + datasets_type)]
    items = [item.strip() for item in path.split(",") if item.strip()]
    if Path(path.strip()).exists():
        items = [path.strip()]
    if not items:
        raise ConfigError(key=key, problem="names no file", fix="name a file or a folder")
    files: list[DataFile] = []
    problems: list[Problem] = []
    for item in items:
        found = _list_item(item, key, is_stream=datasets_type == "iterable")
        if isinstance(found, Problem):
            problems.append(found)
        else:
            files.extend(found)
    if problems:
        raise ConfigError.of(problems)
    places = Counter(map(_place, files))
    if repeated := dict.fromkeys(file.path for file in files if places[_place(file)] > 1):
        raise ConfigError(
            key=key,
            problem=f"names {', '.join(repeated)} more than once",
            fix="name each file once",
        )
    return files


def fingerprint(file: DataFile) -> str:
    """Another text whenever the records are others.

    Contents count, not times: a file that was copied is the same, and one that changed within
    the clock's tick is not. Of a URL it is what its storage says: an ETag, or size and time.

    Raises:
        DataError: It cannot be read.
    """
    try:
        if file.format.startswith(CUSTOM):
            return ask_reader(file, lambda reader: str(reader.fingerprint()))
        if file.format == DATASETS:
            return open_dataset(file)._fingerprint  # noqa: SLF001 - datasets' own cache key
        if file.is_local:
            with Path(file.path).open("rb") as data:
                digest = hashlib.file_digest(data, lambda: hashlib.blake2b(digest_size=16))
            return digest.hexdigest()
        if file.format == STREAM:
            return file.path
        system, inner = _filesystem(file.path)
        return str(system.ukey(inner))
    except OSError as error:
        raise unreadable(file.path, error) from error


def sampled_fingerprint(file: DataFile) -> str:
    """As `fingerprint`, but of a local file a sample of its contents is read, beside its size.

    For data that is too large to be read before it is trained on.

    Raises:
        DataError: It cannot be read.
    """
    if not file.is_local:
        return fingerprint(file)
    try:
        size = Path(file.path).stat().st_size
        digest = hashlib.blake2b(str(size).encode(), digest_size=16)
        with Path(file.path).open("rb") as data:
            for place in range(NUM_SAMPLED):
                data.seek(max(size - SAMPLED_BYTES, 0) * place // (NUM_SAMPLED - 1))
                digest.update(data.read(SAMPLED_BYTES))
        return digest.hexdigest()
    except OSError as error:
        raise unreadable(file.path, error) from error


def file_size(file: DataFile) -> int | None:
    """Bytes of a file as it is stored; None where it is not known."""
    try:
        if file.is_local:
            return Path(file.path).stat().st_size
        if file.format in FORMATS:
            system, inner = _filesystem(file.path)
            return system.size(inner)
    except OSError as error:
        raise unreadable(file.path, error) from error
    return None


def open_dataset(file: DataFile) -> Any:
    """A saved data set, or one of the hub, by the library `datasets`.

    Raises:
        DataError: It is not there, or has no such split.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    name, _, split = file.path.partition("#")
    is_local = Path(name).is_dir()
    try:
        if is_local:
            found = datasets.load_from_disk(name)
            if not isinstance(found, datasets.DatasetDict):
                return found
            return found[split or "train"]
        return datasets.load_dataset(name, split=split or "train", streaming=file.format == STREAM)
    except (OSError, ValueError, KeyError, RuntimeError, DatasetsError) as error:
        problem = "the data set cannot be loaded"
        fix = "see that it is whole, or write another split behind a #"
        if not is_local:
            problem = (
                f"{file.key} names no file or folder here, and as a data set of the hub it "
                "cannot be loaded"
            )
            fix = (
                "correct the path, or the id (a split stands behind a #) and see that the hub "
                "can be reached"
            )
        reason = " ".join(str(error).split())
        raise DataError(problem=f"{problem} ({reason})", fix=fix, file=file.path) from error


def ask_reader(file: DataFile, question: Callable[[Any], T]) -> T:
    """What a reader of the user's own answers; see `readers.RowReader`.

    Raises:
        DataError: It raised something, which may be anything.
    """
    kind = DATASET_TYPES.load(file.format.removeprefix(CUSTOM))
    try:
        return question(kind(file.path))
    except BaseException as error:
        if isinstance(error, OmniError) or not isinstance(error, Exception):
            raise
        raise failed_reader(error, file) from error


def failed_reader(error: Exception, file: DataFile, row: int | None = None) -> DataError:
    """The error for a reader of the user's own that raised, at a row or before any."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return DataError(
        problem=f"the reader raised {type(error).__name__} ({error}) at "
        f"{Path(place.filename).name}:{place.lineno}",
        fix=f"mend {file.format.removeprefix(CUSTOM)}",
        file=file.path,
        row=row,
    )


def unreadable(path: str, error: Exception) -> DataError:
    """The error for a file that cannot be opened or read on."""
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    return DataError(
        problem=f"the file cannot be read ({reason})",
        fix="check that it exists, is whole, and that you may read it",
        file=path,
    )


def format_of(name: str) -> str | None:
    """The format that the ending of a name says; None for none that is known."""
    for end in COMPRESSIONS:
        name = name.removesuffix(end)
    return next((known for known in FORMATS if name.endswith(f".{known}")), None)


def _place(file: DataFile) -> str:
    """What is the same of two names of one file."""
    if "://" in file.path:
        return file.path
    name, split = file.path, ""
    if file.format in (DATASETS, STREAM):
        name, _, split = file.path.partition("#")
        split = split or "train"
    return f"{os.path.normpath(Path(name).absolute())}#{split}"


def _list_item(item: str, key: str, *, is_stream: bool) -> list[DataFile] | Problem:
    name = item.partition("#")[0]
    if "://" in item:
        found = _list_url(item, key)
    elif Path(name).is_dir() and any((Path(name) / saved).is_file() for saved in SAVED):
        found = _list_saved(item, name, key)
    elif Path(item).is_dir():
        names = sorted(str(f) for f in Path(item).iterdir() if f.is_file())
        found = _of_folder(names, f"the folder {item}", key)
    elif Path(item).exists():
        found = _of_names([item], key)
    elif glob.has_magic(item):
        names = sorted(f for f in glob.glob(item, recursive=True) if Path(f).is_file())  # noqa: PTH207
        found = _of_folder(names, f"the pattern {item}", key)
    elif may_be_hub_data(item):
        found = [DataFile(item, STREAM if is_stream else DATASETS, key)]
    else:
        found = Problem(key, f"{item} does not exist", "correct the path, or create the file")
    return found


def _list_saved(item: str, name: str, key: str) -> list[DataFile] | Problem:
    listing = Path(name) / "dataset_dict.json"
    if listing.is_file():
        splits = json.loads(listing.read_text(encoding="utf-8"))["splits"]
        if (item.partition("#")[2] or "train") not in splits:
            fix = f"write one behind it: {', '.join(f'{name}#{split}' for split in splits)}"
            return Problem(key, f"{item} has no such split", fix)
    return [DataFile(item, DATASETS)]


def _list_url(url: str, key: str) -> list[DataFile] | Problem:
    try:
        system, inner = _filesystem(url)
        if glob.has_magic(inner):
            names = sorted(str(name) for name in system.glob(inner))
        elif system.isdir(inner):
            names = sorted(i["name"] for i in system.ls(inner, detail=True) if i["type"] == "file")
        elif system.exists(inner):
            names = [inner]
        else:
            return Problem(key, f"{url} does not exist", "correct the URL")
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())
        return Problem(key, f"{url} cannot be reached ({reason})", "correct the URL")
    return _of_folder([str(system.unstrip_protocol(name)) for name in names], url, key)


def _of_folder(names: list[str], what: str, key: str) -> list[DataFile] | Problem:
    known = [name for name in names if name.endswith(ENDINGS)]
    if not known:
        fix = f"put a file there that ends in {', '.join(ENDINGS)}"
        return Problem(key, f"{what} holds no data file", fix)
    return list(_files(known))


def _of_names(names: list[str], key: str) -> list[DataFile] | Problem:
    for name in names:
        if not name.endswith(ENDINGS):
            hint = suggest("".join(Path(name).suffixes), ENDINGS)
            problem = f"{name} has an unknown ending{f'.{hint}' if hint else ''}"
            return Problem(key, problem, f"use one of {', '.join(ENDINGS)}")
    return list(_files(names))


def _files(names: list[str]) -> Iterator[DataFile]:
    for name in names:
        kind = format_of(name)
        assert kind is not None
        yield DataFile(name, kind)


def _filesystem(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    return url_to_fs(url)
