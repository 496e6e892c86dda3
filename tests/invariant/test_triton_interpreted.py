"""Whole models, and experts on several ranks, with Triton's kernels under its interpreter."""

from __future__ import annotations

import pytest

from tests.unit.kernels.test_interpreted import run_interpreted


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_models_and_spread_experts_compute_what_eager_kernels_do():
    run_interpreted("-m", "slow")
