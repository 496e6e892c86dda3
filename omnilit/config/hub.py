"""What a name that is no path of this machine may mean."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

HUB_ID: Final = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# .txt, .parquet or .bz2, but not the .5 of a version
FILE_ENDING: Final = re.compile(r"\.[A-Za-z]{2,}\d?$")


def may_be_hub_data(name: str) -> bool:
    """Whether a path that does not exist may be a data set of the hub, with or without a #split.

    A mistyped path is none: it ends as a file does, or its first part is a folder here.
    """
    name = name.partition("#")[0]
    is_id = HUB_ID.fullmatch(name) is not None
    return is_id and FILE_ENDING.search(name) is None and not Path(name).parent.is_dir()
