from __future__ import annotations

import pytest

from omnilit.models.towers import Towers, language_part, media_kinds
from tests.helpers.media_models import tiny_media
from tests.helpers.models import tiny

VISION, PROJECTOR, BACKBONE, AUDIO = "vision_tower", "projector", "backbone", "audio_tower"


@pytest.mark.parametrize(
    ("family", "name", "part"),
    [
        ("qwen2_vl", "model.visual.merger.ln_q.weight", VISION),
        ("qwen3_vl", "model.visual.deepstack_merger_list.0.norm.weight", VISION),
        ("qwen3_vl_moe", "model.language_model.layers.0.mlp.experts.gate_up_proj", BACKBONE),
        ("qwen2_5_omni_thinker", "model.audio_tower.conv1.weight", AUDIO),
        ("llava", "model.multi_modal_projector.linear_1.weight", PROJECTOR),
        ("internvl", "model.vision_tower.embeddings.cls_token", VISION),
        ("smolvlm", "model.connector.modality_projection.proj.weight", PROJECTOR),
        ("smolvlm", "lm_head.weight", BACKBONE),
    ],
)
def test_every_parameter_has_a_part(family: str, name: str, part: str):
    model = tiny_media(family)
    assert name in dict(model.named_parameters())
    towers = Towers.of(model)
    assert towers.part_of(name) == part
    expected = {VISION, BACKBONE}
    expected |= {AUDIO} if "omni" in family else set()
    expected |= {PROJECTOR} if family in ("llava", "internvl", "smolvlm") else set()
    assert {towers.part_of(name) for name, _ in model.named_parameters()} == expected


def test_a_frozen_tower_takes_its_merger_along_but_in_omni_models():
    for family, is_frozen in (("qwen3_vl", True), ("qwen3_omni_moe_thinker", False)):
        towers = Towers.of(tiny_media(family))
        merger = "model.visual.merger.norm.weight"
        assert towers.is_frozen(merger, vision=True, audio=True) is is_frozen
        block = "model.visual.blocks.0.norm1.weight"
        assert towers.is_frozen(block, vision=True, audio=False)
        assert not towers.is_frozen(block, vision=False, audio=True)


def test_the_audio_projector_stays_trainable():
    for family, projector in (
        ("qwen2_5_omni_thinker", "proj.weight"),
        ("qwen3_omni_moe_thinker", "proj2.weight"),
    ):
        model = tiny_media(family)
        names = [name for name, _ in model.named_parameters() if "audio_tower" in name]
        towers = Towers.of(model)
        frozen = {name for name in names if towers.is_frozen(name, vision=False, audio=True)}
        assert f"model.audio_tower.{projector}" not in frozen
        assert "model.audio_tower.layers.0.self_attn.q_proj.weight" in frozen


def test_a_projector_beside_a_frozen_tower_is_trained():
    towers = Towers.of(tiny_media("llava"))
    name = "model.multi_modal_projector.linear_1.weight"
    assert not towers.is_frozen(name, vision=True, audio=False)


def test_a_language_model_has_no_towers():
    model = tiny("qwen3")
    assert not media_kinds(model)
    assert language_part(model) is model
    assert Towers.of(model) == Towers((), (), (), ())
