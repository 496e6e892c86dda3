"""A large model on a thousand ranks, rehearsed on this machine through the command line."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "configs/scale/qwen3_235b_a22b.yaml"
WORLD, SHARDS, COPIES, MAX_S, MAX_GIB = 1024, 128, 8, 60, 8
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

# Of the published sizes
HIDDEN, LAYERS, HEADS, KV_HEADS, WIDTH, VOCAB = 4096, 94, 64, 4, 128, 151936
EXPERTS, EXPERT_FFN, TOP_K = 128, 1536, 8
EP, TOKENS = 32, 32768
ATTENTION = 2 * HIDDEN * WIDTH * (HEADS + KV_HEADS) + 2 * WIDTH
BLOCK = ATTENTION + EXPERTS * (HIDDEN + 3 * HIDDEN * EXPERT_FFN) + 2 * HIDDEN
ENDS = 2 * VOCAB * HIDDEN + HIDDEN
WHOLE = LAYERS * BLOCK + ENDS
GIB = 2**30


def test_the_numbers_for_1024_ranks_are_the_closed_sums_in_time_and_memory(capsys):
    words = ["env", "--config", CONFIG, "--world-size", str(WORLD), "--rehearse", "--rank", "1000"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "omnilit", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # of one core: what it takes on a machine that does nothing else
    cpu_s = sum(getattr(after, kind) - getattr(before, kind) for kind in ("ru_utime", "ru_stime"))
    peak_gib = after.ru_maxrss / 2**20
    with capsys.disabled():
        cost = f"{cpu_s:.0f} s of CPU and at most {peak_gib:.2f} GiB"
        sys.stdout.write(f"\n{done.stdout}\n{' '.join(words)}: {cost}\n")
    assert WHOLE == 235_093_634_560
    assert f"rank 1000 of {WORLD}: {WHOLE // SHARDS:,} of {WHOLE:,} parameters" in done.stdout
    experts = LAYERS * EXPERTS * 3 * HIDDEN * EXPERT_FFN
    dense = WHOLE - experts
    part, apart = WHOLE / SHARDS, (SHARDS - 1) * dense / SHARDS
    states = TOKENS * TOP_K * HIDDEN * 2 * (EP - 1) / EP  # to the experts, in bfloat16
    expected = {
        "parameters": 4 * part,
        "gradients": 4 * part,
        "optimizer state": 8 * part,
        "fsdp 128 gather parameters": 2 * (2 * apart - ENDS * (SHARDS - 1) / SHARDS),
        "fsdp 128 reduce-scatter gradients": 4 * apart,
        "efsdp 4 gather parameters": 2 * 2 * 3 * experts / SHARDS,
        "efsdp 4 reduce-scatter gradients": 4 * 3 * experts / SHARDS,
        "dp_replicate 8 all-reduce gradients": 2 * 4 * part * (COPIES - 1) / COPIES,
        "ep 32 all-to-all tokens, evenly routed": 2 * 3 * LAYERS * states,
    }
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    found = {
        name: float(gib)
        for name, _, gib in (line.rpartition(" ") for line in lines)
        if re.fullmatch(r"\d+\.\d+", gib)
    }
    for name, num_bytes in expected.items():
        assert found[name] == pytest.approx(num_bytes / GIB, abs=1e-3), name
    assert cpu_s < MAX_S
    assert peak_gib < MAX_GIB
