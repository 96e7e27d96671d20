from __future__ import annotations

from pathlib import Path

from megatron_minpro.tasks.arithmetic_chains.tokenizer import build_tokenizer


def test_the_saved_tokenizer_loads_beside_a_qwen3_moe_config(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    built = build_tokenizer(tmp_path / "model")
    (tmp_path / "model/config.json").write_text('{"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}')
    loaded = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert len(loaded) == len(built) == 24
    assert loaded.get_vocab() == built.get_vocab()
    assert (loaded.eos_token, loaded.pad_token, loaded.unk_token) == ("<|end|>", "<|pad|>", "<|unknown|>")
    conversation = [{"role": "user", "content": "3 + 4 :"}, {"role": "assistant", "content": "3 + 4 = 7 ;"}]
    rendered = loaded.apply_chat_template(conversation, tokenize=False)
    assert rendered.split() == ["<|user|>", "3", "+", "4", ":", "<|assistant|>", "3", "+", "4", "=", "7", ";", "<|end|>"]
    assert loaded.decode(loaded("3 + 4 = 7 ;")["input_ids"]) == "3 + 4 = 7 ;"
