"""Pages in headless Chromium: what becomes of them, what it complains of, and how they look."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.image import imread

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",  # it refuses to start as root otherwise, and the pages are our own
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
)
DARK = "--blink-settings=preferredColorScheme=0"
LIGHT = "--blink-settings=preferredColorScheme=1"


class Shown(NamedTuple):
    """A page after its scripts have run.

    Args:
        dom: All of it as HTML.
        complaints: What the browser's console says: errors of scripts, and what was blocked.
    """

    dom: str
    complaints: list[str]


def find_browser() -> str:
    """The command of Chromium; a test without it fails, it is never left out."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    assert found, f"none of {', '.join(NAMES)} is on the PATH: `make browser` says how to get one"
    return found


def show(page: Path) -> Shown:
    """Open a page and wait for its scripts."""
    done = _run(page, "--dump-dom")
    return Shown(done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line])


def take_picture(
    page: Path, picture: Path, *flags: str, size: tuple[int, int] = (1366, 1800)
) -> npt.NDArray[np.uint8]:
    """Write a picture of a page.

    Args:
        page: To open.
        picture: A PNG file.
        flags: `DARK` or `LIGHT`.
        size: Width and height of the window.

    Returns:
        Its pixels, [height, width, 3].
    """
    _run(page, f"--window-size={size[0]},{size[1]}", f"--screenshot={picture}", *flags)
    return (imread(picture)[..., :3] * 255).round().astype(np.uint8)


def _run(page: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        own = (f"--user-data-dir={profile}", *flags, page.resolve().as_uri())
        return subprocess.run(
            [find_browser(), *FLAGS, *own], capture_output=True, text=True, timeout=60, check=True
        )
