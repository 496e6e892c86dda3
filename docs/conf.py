"""How `make docs` builds the site: Sphinx, furo, markdown; nothing is downloaded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

sys.path.insert(0, str(Path(__file__).parent))

from sitegen.pages import fill

from omnilit import __version__

if TYPE_CHECKING:
    from sphinx.application import Sphinx  # pyright: ignore[reportMissingImports] - an extra

project: Final = "omnilit"
author: Final = "the omnilit developers"
release: Final = __version__
extensions: Final = ["myst_parser"]
source_suffix: Final = {".md": "markdown"}
exclude_patterns: Final = ["sitegen"]
myst_enable_extensions: Final = ["deflist"]
myst_heading_anchors: Final = 3
html_theme: Final = "furo"
html_title: Final = f"omnilit {__version__}"
html_static_path: Final = ["_static"]
html_css_files: Final = ["site.css"]
html_copy_source: Final = False
html_show_sourcelink: Final = False


def _fill(_app: Sphinx, _docname: str, source: list[str]) -> None:
    source[0] = fill(source[0])


def setup(app: Sphinx) -> None:
    """Put what is made from the source into the pages as they are read."""
    app.connect("source-read", _fill)
