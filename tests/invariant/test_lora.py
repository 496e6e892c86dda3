"""Adapters in every layout that trains them, against one process."""

from __future__ import annotations

import pytest

from tests.helpers import lora_runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_every_layout_trains_the_steps_of_one_process(tmp_path):
    lora_runs.write_inputs(tmp_path)
    lora_runs.check_layouts(tmp_path, list(lora_runs.CASES), tmp_path=tmp_path)
