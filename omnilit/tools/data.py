"""`omnilit data`: what a data set holds, as training would see it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.console import Console

from omnilit.cli.plan import READ_BY_DATA, make_data_view, read
from omnilit.cli.raw import Command, read_command
from omnilit.config.coerce import describe
from omnilit.errors import ConfigError, Problem
from omnilit.logging import format_table, show_on_rank_zero
from omnilit.tools.flags import take_count, take_value

if TYPE_CHECKING:
    from omnilit.tools.data_load import Loaded
    from omnilit.tools.data_report import PartReport

PNG: Final = "data_lengths.png"
OWN: Final = ("show", "html", "png", "decode")  # flags of the verb
USAGE: Final = f"""\
usage: omnilit data --config FILE [--show N] [--html FILE] [--png [FILE]] [--decode]
                    [--path.to.field VALUE]

Reads and tokenises the data of a training configuration as `fit` would, and tells what it found:
records, tokens, lengths, packing, duplicates, and every record that cannot be used. The tokens
stay in the cache, where `fit` finds them. Nothing is written to output_dir.

  --show N      print N samples, spread evenly over the training data, with the supervised text in
                colour, or in [[double brackets]] where the output is no terminal
  --html FILE   write the same, samples included, as one page
  --png [FILE]  write the histogram; without a name to {PNG} beside the page, or here
  --decode      decode every image, video and sound, to find those that are damaged behind their
                heads, where training would meet them only later

Exits with 2 where `fit` would refuse the data: a bad record without data.silent_exception, or more
of them than data.max_bad_fraction.
"""


@dataclass(frozen=True, slots=True)
class Request:
    """What the command line asks for.

    Args:
        command: Configuration files and overrides.
        num_shown: Samples to print.
        html: Where to write the page; None for no page.
        png: Where to write the histogram; None for none.
        is_decoded: Whether all media are decoded.
    """

    command: Command
    num_shown: int = 0
    html: Path | None = None
    png: Path | None = None
    is_decoded: bool = False


def run(argv: Sequence[str]) -> int:
    """Look into the data of a configuration; returns the exit code.

    Raises:
        ConfigError: Settings are wrong; with all their problems.
        DataError: The data cannot be read at all, or holds no sample.
    """
    request = parse_request(argv)
    if request.command.help_group is not None:
        sys.stdout.write(help_text(request.command))
        return 0
    logging.getLogger("transformers").setLevel(logging.ERROR)
    show_on_rank_zero(0)
    view = make_data_view(request.command)
    # imported only now: a wrong setting is told at once
    from omnilit.tools.data_load import load_data

    found = load_data(view, num_shown=request.num_shown, is_decoded=request.is_decoded)
    write_outputs(request, found, Console(highlight=False))
    refusals = find_refusals(
        found.parts,
        is_silent=view["data.silent_exception"],
        max_bad_fraction=view["data.max_bad_fraction"],
    )
    sys.stderr.write("".join(f"fit would refuse this data: {line}\n" for line in refusals))
    return 2 if refusals else 0


def parse_request(argv: Sequence[str]) -> Request:
    """Take the verb's own flags out of the others.

    Raises:
        ConfigError: A flag without its value or with a wrong one; all of them together.
    """
    command = read_command(argv)
    own = {name: words for name, words in command.flags if name in OWN}
    problems: list[Problem] = []
    if command.is_print_config:
        fix = "use omnilit fit --print_config"
        problems.append(Problem("--print_config", "data prints no configuration", fix))
    if command.help_group:
        problem = f"there is no group {command.help_group!r}, but one page"
        problems.append(Problem("--help", problem, "give --help alone"))
    shown = take_count(own, "show", problems) if "show" in own else 0
    html = Path(take_value(own, "html", str, problems)) if "html" in own else None
    png = None
    if "png" in own:
        beside = html.parent if html else Path()
        png = Path(take_value(own, "png", str, problems)) if own["png"] else beside / PNG
    if own.get("decode"):
        problems.append(Problem("--decode", "takes no value", "write it alone, or leave it out"))
    if problems:
        raise ConfigError.of(problems)
    flags = tuple(flag for flag in command.flags if flag[0] not in own)
    return Request(replace(command, flags=flags), shown, html, png, "decode" in own)


def help_text(command: Command) -> str:
    """Usage, and the settings that the verb reads."""
    fields = [f for f in read(command).fields if f.path.startswith(READ_BY_DATA)]
    rows = [
        (
            f"--{f.path}",
            describe(f.annotation),
            "required" if f.required else f.default,
            f.description,
        )
        for f in fields
    ]
    table = format_table("settings:", ("setting", "type", "default", "meaning"), rows)
    return f"{USAGE}\n{table}\n"


def write_outputs(request: Request, found: Loaded, console: Console) -> None:
    """Print what was found, and write the files that were asked for.

    Raises:
        ConfigError: One of them cannot be written.
    """
    from omnilit.tools.data_page import build_page
    from omnilit.tools.data_report import build_histograms
    from omnilit.tools.data_view import show_parts, show_samples
    from omnilit.tools.histogram import save_png
    from omnilit.tools.page import save_page

    show_parts(found.parts, console)
    show_samples(found.samples, console)
    if request.html is not None:
        title = "Data of " + ", ".join(map(str, request.command.files))
        save_page(build_page(title, found.parts, found.samples), request.html, key="--html")
        sys.stderr.write(f"page: {request.html}\n")
    histograms = [h for part in found.parts for h in build_histograms(part)]
    if request.png is not None and histograms:
        save_png(histograms, request.png)
        sys.stderr.write(f"histogram: {request.png}\n")
    elif request.png is not None:
        sys.stderr.write(f"no histogram in {request.png}: there are no samples\n")


def find_refusals(
    parts: Sequence[PartReport], *, is_silent: bool, max_bad_fraction: float
) -> list[str]:
    """Why training would not start on this data; nothing where it would.

    Args:
        parts: Training data, evaluation data.
        is_silent: `data.silent_exception`: bad records are skipped.
        max_bad_fraction: Share of them that is too much.
    """
    found = [f"{part.title}: {failure}" for part in parts for failure in part.failures]
    for part in parts:
        bad, records = part.num_bad, part.num_records
        count = f"{part.title}: {bad:,} of {records:,} records {'is' if bad == 1 else 'are'} bad"
        if bad and not is_silent:
            found.append(f"{count}, and data.silent_exception is false")
        elif bad > max_bad_fraction * records:
            found.append(f"{count}, more than data.max_bad_fraction {max_bad_fraction:g}")
        if part.num_damaged and not is_silent:
            number = f"{part.num_damaged:,} images, videos or sounds"
            found.append(f"{part.title}: {number} cannot be decoded, where training would stop")
    return found
