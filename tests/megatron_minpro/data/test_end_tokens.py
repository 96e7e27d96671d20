"""Where a response ends, with the real Qwen3 tokenizer and the files that are published beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_minpro.batch.conversation import Conversation
from megatron_minpro.batch.prompt import Prompt
from megatron_minpro.data.end_tokens import end_of_turn_id, end_token_ids, response_text, without_special_tokens
from megatron_minpro.rewards.registry import make_reward

IM_END, END_OF_TEXT = 151645, 151643


@pytest.fixture
def model_folder(assets: Path, tmp_path: Path) -> Path:
    """config.json (one end token) and generation_config.json (two) of the published Qwen3-30B-A3B."""
    for name in ("config.json", "generation_config.json"):
        shutil.copy(assets / "models/qwen3_30b_a3b" / name, tmp_path / name)
    return tmp_path


def say(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_published_qwen3_stops_at_two_tokens(model_folder: Path, qwen_tokenizer: Any) -> None:
    assert end_token_ids(model_folder, qwen_tokenizer) == (END_OF_TEXT, IM_END)


def test_a_base_model_stops_where_its_chat_template_ends_a_turn(model_folder: Path, assets: Path) -> None:
    from transformers import AutoTokenizer

    say(model_folder / "config.json", eos_token_id=END_OF_TEXT)
    say(model_folder / "generation_config.json", eos_token_id=END_OF_TEXT)
    base = AutoTokenizer.from_pretrained(assets / "models/qwen3_30b_a3b", eos_token="<|endoftext|>")
    assert base.eos_token_id == END_OF_TEXT
    assert end_of_turn_id(base) == IM_END
    assert end_token_ids(model_folder, base) == (END_OF_TEXT, IM_END)


def test_a_setting_adds_end_tokens_by_text_or_id(model_folder: Path, qwen_tokenizer: Any) -> None:
    think = qwen_tokenizer.convert_tokens_to_ids("</think>")
    assert end_token_ids(model_folder, qwen_tokenizer, extra=["</think>", 5]) == (5, END_OF_TEXT, IM_END, think)
    with pytest.raises(ValueError, match=r"^end_tokens: 'two words' is 2 tokens of this tokenizer, expected exactly one known token$"):
        end_token_ids(model_folder, qwen_tokenizer, extra=["two words"])
    with pytest.raises(ValueError, match=r"^end_tokens: 999999 is not a token id"):
        end_token_ids(model_folder, qwen_tokenizer, extra=[999_999])


def test_an_end_token_that_is_no_id_names_its_file(model_folder: Path, qwen_tokenizer: Any) -> None:
    say(model_folder / "generation_config.json", eos_token_id=["<|im_end|>"])
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id = \['<\|im_end\|>'\], expected a token id or a list"):
        end_token_ids(model_folder, qwen_tokenizer)


def test_the_small_task_has_one_end_token(chain_tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": chain_tokenizer.eos_token_id}))
    end_ids = end_token_ids(tmp_path, chain_tokenizer)
    assert end_ids == (chain_tokenizer.eos_token_id,)
    token_ids = chain_tokenizer("3 + 4 = 7 ; <|end|>", add_special_tokens=False)["input_ids"]
    assert response_text(chain_tokenizer, token_ids, end_ids=end_ids) == "3 + 4 = 7 ;"


@pytest.mark.parametrize("ending", ["<|endoftext|>", "<|im_end|>", "<|im_end|>\n<|endoftext|>", ""])
def test_an_answer_is_right_whatever_token_ends_it(qwen_tokenizer: Any, ending: str) -> None:
    reward = make_reward("math_verify", style="dapo")
    prompt = Prompt(prompt_id="p", text="17 + 17?", token_ids=(1,), answer="34", source="test")
    token_ids = qwen_tokenizer(f"17 + 17 = 34.\nAnswer: 34{ending}")["input_ids"]
    text = response_text(qwen_tokenizer, token_ids, end_ids=(END_OF_TEXT, IM_END))
    served = without_special_tokens(qwen_tokenizer, f"17 + 17 = 34.\nAnswer: 34{ending}")
    said = [Conversation.of_text(prompt, answer, finish_reason="stop", num_response_tokens=9) for answer in (text, served)]
    assert [result.reward for result in reward.score(said)] == [1.0, 1.0]
    reward.close()


def test_reasoning_marks_stay_and_an_added_end_token_is_cut_at_the_end(qwen_tokenizer: Any) -> None:
    token_ids = qwen_tokenizer("<think>a</think>b</think>")["input_ids"]
    think = qwen_tokenizer.convert_tokens_to_ids("</think>")
    assert response_text(qwen_tokenizer, token_ids, end_ids=(think, IM_END)) == "<think>a</think>b"
