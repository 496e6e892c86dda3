"""Sizes of parallel axes for property tests."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from omnilit.config.parallel_sizes import ParallelSizes

SMALL = st.sampled_from([1, 2, 3, 4])


@st.composite
def resolved_sizes(draw: st.DrawFn) -> ParallelSizes:
    """Any sizes that fit, as numbers of ranks; at most 1,024 of these."""
    is_ddp = draw(st.booleans())
    sizes = ParallelSizes(
        dp_replicate_size=draw(SMALL),
        dp_shard_size=1 if is_ddp else draw(SMALL),
        tp_size=draw(st.sampled_from([1, 2, 3])),
        pp_size=draw(st.sampled_from([1, 2])),
        ulysses_size=draw(SMALL),
        cp_size=draw(st.sampled_from([1, 2])),
        ep_outside=draw(st.booleans()),
        is_ddp=is_ddp,
    )
    if is_ddp:
        return sizes
    divisors = [n for n in range(1, sizes.copy_size + 1) if sizes.copy_size % n == 0]
    return replace(sizes, ep_size=draw(st.sampled_from(divisors)))
