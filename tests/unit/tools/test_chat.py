import io
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen3ForCausalLM

from omnilit.config import InferArguments
from omnilit.errors import CheckpointError, ConfigError, DataError
from omnilit.models.build import stop_tokens
from omnilit.tools.chat import context_size, open_chat


def chat_with(folder, **fields):
    arguments = InferArguments(model_path=str(folder), **{"max_tokens": 8, **fields})
    return open_chat(arguments, str(folder), "cpu", io.StringIO())


def greedy_by_hand(folder, text, steps):
    model = Qwen3ForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    with torch.inference_mode():
        for _ in range(steps):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


@pytest.mark.parametrize("fields", [{"do_sample": False}, {"temperature": 0.0}])
def test_greedy_answer_is_the_argmax_after_the_rendered_prompt(model_folder, fields):
    answer = chat_with(model_folder, **fields).ask("hi")
    assert answer == greedy_by_hand(model_folder, "uhi;a", 8)


def test_history_is_part_of_the_next_prompt(model_folder):
    chat = chat_with(model_folder, do_sample=False, max_tokens=3)
    first = chat.ask("hi")
    second = chat.ask("yo")
    assert second == greedy_by_hand(model_folder, f"uhi;a{first};uyo;a", 3)
    assert [m.content for m in chat.messages] == ["hi", first, "yo", second]


def test_streamed_text_is_the_answer(model_folder):
    chat = chat_with(model_folder, do_sample=False)
    chat.out = out = io.StringIO()
    answer = chat.ask("hi")
    assert out.getvalue() == answer + "\n"


def test_seed_decides_what_is_sampled(model_folder):
    first, again, other = (
        chat_with(model_folder, seed=seed, max_tokens=20).ask("hi") for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_low_top_p_leaves_only_the_likeliest_token(model_folder):
    greedy = chat_with(model_folder, do_sample=False).ask("hi")
    assert chat_with(model_folder, top_p=1e-6).ask("hi") == greedy


def test_answer_stops_at_the_end_of_the_context(model_folder):
    chat = chat_with(model_folder, do_sample=False, max_tokens=1000)
    chat.model.generation_config.eos_token_id = None
    chat.tokenizer.eos_token = None
    chat.ask("x" * 50)
    room = context_size(chat.model) - len("u" + "x" * 50 + ";a")
    assert chat.model.generation_config.max_new_tokens == room == 11


def test_prompt_longer_than_the_context_is_refused_and_forgotten(model_folder):
    chat = chat_with(model_folder)
    with pytest.raises(DataError, match=r"prompt of 64 tokens .* context of 64\. To fix: ask"):
        chat.ask("x" * 61)
    assert chat.messages == []


def test_answer_ends_at_the_ends_of_model_and_tokenizer(model_folder):
    chat = chat_with(model_folder)
    chat.model.generation_config.eos_token_id = [3, 5]
    assert stop_tokens(chat.model.generation_config, chat.tokenizer) == [
        3,
        5,
        chat.tokenizer.eos_token_id,
    ]
    chat.model.generation_config.eos_token_id = None
    assert stop_tokens(chat.model.generation_config, chat.tokenizer) == [
        chat.tokenizer.eos_token_id
    ]


@pytest.fixture
def broken(model_folder, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(model_folder, folder)
    return folder


def test_missing_weight_is_refused(broken):
    weights = load_file(broken / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 weights are missing, .* model\.norm\.weight"):
        chat_with(broken)


def test_cut_weights_file_is_refused(broken):
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="the model cannot be loaded"):
        chat_with(broken)


def test_absent_weights_are_refused(broken):
    (broken / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="the model cannot be loaded"):
        chat_with(broken)


def test_tokenizer_without_template_is_refused(broken):
    (broken / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match=r"infer\.tokenizer_path: .* has no chat template"):
        chat_with(broken)


def test_code_beside_the_weights_is_neither_run_nor_asked_about(broken, monkeypatch):
    config = json.loads((broken / "config.json").read_text())
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    config |= {"model_type": "own", "auto_map": classes}
    (broken / "config.json").write_text(json.dumps(config))
    (broken / "own.py").write_text(f"open({str(broken / 'ran')!r}, 'w').close()\n")
    asked = []
    monkeypatch.setattr("builtins.input", lambda text="": asked.append(text) or "y")
    with pytest.raises((CheckpointError, ConfigError), match="contains custom code"):
        chat_with(broken)
    assert asked == []
    assert not (broken / "ran").exists()


def test_absent_tokenizer_is_refused(model_folder, tmp_path):
    with pytest.raises(ConfigError, match=r"infer\.tokenizer_path: no tokenizer can be read"):
        chat_with(model_folder, tokenizer_path=str(tmp_path))


def test_tokenizer_may_come_from_another_folder(model_folder, broken):
    (broken / "tokenizer.json").unlink()
    chat = chat_with(broken, tokenizer_path=str(model_folder), do_sample=False)
    assert chat.ask("hi") == greedy_by_hand(model_folder, "uhi;a", 8)
