import pytest

from omnilit.cli.main import run
from omnilit.errors import ConfigError


def shown(capsys, *words):
    assert run("fit", ["--help", *words]) == 0
    return capsys.readouterr().out


def test_help_shows_our_groups_and_names_where_lightnings_are(capsys):
    text = shown(capsys)
    for flag in ("--model.model_path", "--data.train_path", "--train.optimizer.lr"):
        assert flag in text
    assert "omnilit fit --help trainer" in text
    assert "--trainer.devices" not in text
    assert text.index("--model.model_path") < text.index("--data.train_path")


def test_help_of_a_group_shows_that_group_alone(capsys):
    text = shown(capsys, "trainer")
    assert "--trainer.devices" in text
    assert "--trainer.precision" not in text  # ours decides
    assert "--model.model_path" not in text
    assert "--dpo_config.beta" in shown(capsys, "dpo_config")


def test_help_of_an_unknown_group_lists_the_groups():
    with pytest.raises(ConfigError, match="there is no group 'trian'"):
        run("fit", ["--help", "trian"])


def test_print_config_prints_and_stops(capsys):
    assert run("fit", ["--print_config", "--train.seed", "7"]) == 0
    assert "seed: 7" in capsys.readouterr().out
