from pathlib import Path

import pytest

from omnilit.cli.plan import read
from omnilit.cli.raw import read_command
from omnilit.config.status import load_status, refuse_later
from omnilit.config.view import View
from omnilit.data.multisource import read_mixture

ROOT = Path(__file__).resolve().parents[3]
MIXTURES = sorted((ROOT / "configs" / "data").glob("*.yaml"))
CONFIGS = sorted({*(ROOT / "configs").rglob("*.yaml")} - {*MIXTURES})


@pytest.mark.parametrize("file", CONFIGS, ids=[str(f.relative_to(ROOT)) for f in CONFIGS])
def test_a_shipped_configuration_has_only_keys_and_values_that_work_today(file):
    reading = read(read_command(["--config", str(file)]))
    assert not reading.problems
    assert not refuse_later(View.of(reading.checked, list(reading.fields)), load_status())


@pytest.mark.parametrize("file", MIXTURES, ids=[f.name for f in MIXTURES])
def test_a_shipped_mixture_of_sources_is_a_good_one(file):
    assert len(read_mixture(str(file), key="data.train_path").sources) > 1
