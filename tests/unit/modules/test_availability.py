import pytest

from omnilit.config import (
    GradientCheckpointingConfig,
    TrainingArguments,
)
from omnilit.errors import ConfigError
from omnilit.modules import (
    DiffusionModule,
    OmniComposedModule,
    OmniDataModule,
    SFTModule,
)


def refused(**train):
    with pytest.raises(ConfigError) as caught:
        SFTModule(config_path="unused", train=TrainingArguments(**train))
    return {problem.key for problem in caught.value.problems}


def test_settings_of_towers_are_refused_where_none_is_trained():
    found = refused(freeze_audio_tower=True, freeze_vit=True, vit_lr=1e-5)
    assert found == {"train.freeze_audio_tower", "train.freeze_vit", "train.vit_lr"}


def test_the_models_own_later_arguments_are_refused_in_python_too():
    with pytest.raises(ConfigError, match=r"model\.encode_target: .*not available yet"):
        SFTModule(config_path="unused", encode_target=True)


def test_defaults_and_what_is_available_are_fine():
    train = TrainingArguments(max_steps=3, gradient_checkpointing=GradientCheckpointingConfig())
    assert SFTModule(config_path="unused", train=train).train_arguments is train


@pytest.mark.parametrize("task", [DiffusionModule, OmniComposedModule])
def test_a_task_of_a_later_release_says_so(task):
    with pytest.raises(ConfigError, match=f"{task.__name__} is not available yet"):
        task(config_path="unused")


@pytest.mark.parametrize("is_file", [True, False])
def test_the_tokenizer_lies_beside_the_configuration_by_default(tmp_path, is_file):
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "config.json" if is_file else tmp_path
    assert SFTModule(config_path=str(path)).tokenizer_path == str(tmp_path)


def test_the_data_modules_later_arguments_are_refused_in_python_too():
    with pytest.raises(ConfigError) as caught:
        OmniDataModule(train_path="unused", data_type="diffusion")
    assert {problem.key for problem in caught.value.problems} == {"data.data_type"}
    with pytest.raises(ConfigError, match=r"data\.mm_configs\.fpz: there is no such setting"):
        OmniDataModule(train_path="unused", mm_configs={"fpz": 1})
