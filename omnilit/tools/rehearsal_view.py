"""`omnilit env --rehearse`: what one rank of a run would hold and send, as tables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from omnilit.logging import format_table
from omnilit.parallel.sequence import SequenceLayout
from omnilit.parallel.shards import HeldParameter
from omnilit.tools.rehearsal import Rehearsal

GIB: Final = 2**30
LAYER: Final = re.compile(r"\.\d+\.")
Rows = Iterator[tuple[object, ...]]


def describe(found: Rehearsal) -> str:
    """All tables of a rehearsal."""
    held = found.parameters
    whole = sum(parameter.numel for parameter in held)
    own = sum(parameter.own for parameter in held)
    stage = " in its stage" if found.sizes.pp_size > 1 else ""
    title = (
        f"{found.model_type} on rank {found.rank} of {found.sizes.world_size}: "
        f"{own:,} of {whole:,} parameters{stage}"
    )
    where = " in host memory" if found.is_offloaded else ""
    step = found.step
    ranks = f"{found.sizes.data_size} data ranks"
    sent = (
        f"sent by this rank in a step of {step.micro_batches} x {step.tokens:,} tokens "
        f"on each of {ranks}"
    )
    tables = [
        format_table(title, (f"what it holds{where}", "GiB"), _memory(found)),
        format_table(sent, ("axis", "ranks", "what", "GiB"), _traffic(found)),
    ]
    if uneven := list(_uneven(found)):
        header = ("what does not divide", "size", "ranks", "what comes of it")
        tables.append(format_table("uneven", header, uneven))
    else:
        tables.append("uneven\n  nothing: every axis divides what it splits")
    return "\n\n".join(tables) + "\n"


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.3f}"


def _memory(found: Rehearsal) -> Rows:
    kept = found.parameter_bytes + found.gradient_bytes + found.moment_bytes
    yield "parameters", _gib(found.parameter_bytes)
    yield "gradients", _gib(found.gradient_bytes)
    yield "optimizer state", _gib(found.moment_bytes)
    yield "all three", _gib(kept)
    largest = max(found.units, key=lambda unit: unit.gathered)
    name = largest.name or "the rest of the model"
    gathered = largest.gathered * found.step.compute_bytes
    yield f"on the device while it computes: {name}, gathered", _gib(gathered)
    if found.unreduced_bytes:
        what = "on the device until the step's last micro-batch: whole gradients"
        yield what, _gib(found.unreduced_bytes)


def _traffic(found: Rehearsal) -> Rows:
    for one in found.traffic:
        yield one.axis, one.ranks, one.what, _gib(one.sent)
    yield "all", "", "", _gib(sum(one.sent for one in found.traffic))


def _uneven(found: Rehearsal) -> Rows:
    """Parameters of which some ranks hold less, layers of one name in one row, and the rest."""
    seen: dict[tuple[str, int, int], list[HeldParameter]] = {}
    for held in found.parameters:
        if not held.is_even:
            name = LAYER.sub(".*.", held.name)
            seen.setdefault((name, held.rows, held.ranks), []).append(held)
    for (name, rows, ranks), alike in seen.items():
        part = -(-rows // ranks)
        whole = rows // part
        rest = f"one {rows % part}, " if rows % part else ""
        empty = ranks - whole - bool(rest)
        what = f"{whole} ranks hold {part}, {rest}{empty} none"
        padding = sum(p.part * p.ranks - p.rows * (p.part // part) for p in alike)
        yield name, rows, ranks, f"{what}; {padding:,} elements of padding travel along"
    yield from _uneven_sizes(found)


def _uneven_sizes(found: Rehearsal) -> Rows:
    sizes, tokens = found.sizes, found.step.tokens
    multiple = SequenceLayout(sizes.cp_size, sizes.ulysses_size).multiple
    if rest := tokens % multiple:
        what = f"a full micro-batch is filled up to {tokens + multiple - rest}"
        yield "tokens of a micro-batch", tokens, multiple, what
