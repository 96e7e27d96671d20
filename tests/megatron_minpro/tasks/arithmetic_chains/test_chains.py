from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_minpro.rewards.reward import make_reward
from megatron_minpro.tasks.arithmetic_chains.chains import (
    ArithmeticChains,
    Chain,
    WorkedExampleNoise,
    WorkedExamples,
    build_tokenizer,
    permuted,
)

NO_NOISE = WorkedExampleNoise(hard_entries=0, hard_error=0, easy_error=0, lazy=0, garble=0)


def left_fold(text: str, modulus: int) -> int:
    """Independent of the implementation: Python evaluates the parenthesised expression over the integers, reduced once at the end."""
    first, *rest = text.removesuffix(" :").split()
    expression = first
    for operation, value in zip(rest[::2], rest[1::2], strict=True):
        expression = f"({expression} {operation} {value})"
    return eval(expression) % modulus


def test_a_chain_folds_from_the_left_modulo_ten() -> None:
    chain = Chain(values=(7, 6, 4, 6, 7, 1, 5), operations=("-", "-", "*", "-", "*", "*"), modulus=10)
    assert chain.text == "7 - 6 - 4 * 6 - 7 * 1 * 5 :"
    assert chain.result == 5  # 1, -3 = 7, 42 = 2, -5 = 5, 5, 25 = 5


def test_every_answer_is_the_left_fold_of_its_text(chain_tokenizer: Any) -> None:
    chains = ArithmeticChains(chain_tokenizer, num_operations=6, modulus=10, size=1000, seed=1, split="train")
    for prompt in chains.prompts(range(300)):
        assert int(prompt.answer) == left_fold(prompt.text, 10)


def test_a_prompt_has_sixteen_tokens_and_reads_back_as_its_text(chain_tokenizer: Any) -> None:
    prompt = ArithmeticChains(chain_tokenizer, num_operations=6, modulus=10, size=10, seed=1, split="train")[3]
    assert len(prompt.token_ids) == 16
    assert chain_tokenizer.decode(prompt.token_ids) == f"<|user|> {prompt.text} <|assistant|>"


@given(st.integers(1, 300), st.text(max_size=5))
def test_permuted_is_one_to_one(size: int, key: str) -> None:
    assert sorted(permuted(index, size=size, key=key) for index in range(size)) == list(range(size))


def test_permuted_moves_things_and_differs_between_keys() -> None:
    first, second = ([permuted(index, size=1000, key=key) for index in range(1000)] for key in ("a", "b"))
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 20  # one is expected by chance
    assert sum(index == value for index, value in enumerate(first)) < 20


def test_the_splits_together_are_all_chains_and_never_overlap_whatever_the_seeds(chain_tokenizer: Any) -> None:
    kind = {"num_operations": 2, "modulus": 3}  # 3^3 * 3^2 = 243 chains, 243 // 16 = 15 held out
    train = ArithmeticChains(chain_tokenizer, **kind, size=228, seed=1, split="train")
    held_out = ArithmeticChains(chain_tokenizer, **kind, size=15, seed=99, split="held_out")
    train_texts = [prompt.text for prompt in train.prompts(range(228))]
    held_out_texts = [prompt.text for prompt in held_out.prompts(range(15))]
    assert len(set(train_texts)) == 228
    assert len(set(held_out_texts)) == 15
    assert len(set(train_texts) | set(held_out_texts)) == 243


def test_the_seed_changes_the_order_but_not_the_split(chain_tokenizer: Any) -> None:
    kind: dict[str, Any] = {"num_operations": 2, "modulus": 3, "size": 15, "split": "held_out"}
    first, second = ([prompt.text for prompt in ArithmeticChains(chain_tokenizer, **kind, seed=seed).prompts(range(15))] for seed in (0, 1))
    assert first != second
    assert sorted(first) == sorted(second)


def test_a_prompt_depends_on_its_index_alone(chain_tokenizer: Any) -> None:
    short, long = (
        ArithmeticChains(chain_tokenizer, num_operations=6, modulus=10, size=size, seed=4, split="train") for size in (5, 50_000)
    )
    assert [short[index] for index in (4, 2, 0)] == [long[index] for index in (4, 2, 0)]
    assert short.prompts([4, 2]) == [short[4], short[2]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_operations": 0}, "num_operations must be at least 1, got 0"),
        ({"modulus": 1}, "modulus must be at least 2, got 1"),
        ({"modulus": 11}, "does not know '10'"),
        ({"size": 0}, "size = 0"),
        ({"num_operations": 1, "modulus": 2, "size": 12}, "size = 12, but the train split has 1 to 11"),
        ({"split": "test"}, "split = 'test'"),
    ],
)
def test_options_out_of_range_are_refused(chain_tokenizer: Any, change: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"num_operations": 6, "modulus": 10, "size": 10, "seed": 0, "split": "train"}
    with pytest.raises(ValueError, match=message):
        ArithmeticChains(chain_tokenizer, **{**options, **change})


def test_a_loop_over_the_source_ends(chain_tokenizer: Any) -> None:
    chains = ArithmeticChains(chain_tokenizer, num_operations=6, modulus=10, size=7, seed=0, split="train")
    assert len(list(chains)) == 7


def worked_examples(tokenizer: Any, noise: WorkedExampleNoise, *, count: int = 200) -> list[Any]:
    chains = ArithmeticChains(tokenizer, num_operations=6, modulus=10, size=5000, seed=1, split="train")
    return WorkedExamples(chains, tokenizer, noise=noise, seed=0).batch(0, count)


def steps_of(response: str) -> list[tuple[int, str, int, int]]:
    steps = re.findall(r"([0-9]) ([-+*]) ([0-9]) = ([0-9]) ;", response)
    return [(int(left), operation, int(right), int(result)) for left, operation, right, result in steps]


def test_without_noise_every_step_is_right_and_the_reward_is_one(chain_tokenizer: Any) -> None:
    examples = worked_examples(chain_tokenizer, NO_NOISE)
    for example in examples:
        assert len(example.response_token_ids) == 37  # six steps of six words, and the end
        assert example.response_token_ids[-1] == chain_tokenizer.eos_token_id
        assert chain_tokenizer.decode(example.response_token_ids, skip_special_tokens=True) == example.response
        for left, operation, right, result in steps_of(example.response):
            assert eval(f"{left} {operation} {right}") % 10 == result
    reward = make_reward("final_step")
    results = reward.score([example.prompt for example in examples], [example.response for example in examples], ["stop"] * 200)
    assert all(result.correct for result in results)


def test_on_hard_entries_the_same_mistake_is_made_everywhere(chain_tokenizer: Any) -> None:
    always_wrong = WorkedExampleNoise(hard_entries=1, hard_error=1, easy_error=0, lazy=0, garble=0, favourite_share=1)
    mistakes: dict[tuple[int, str, int], set[int]] = {}
    for example in worked_examples(chain_tokenizer, always_wrong):
        for left, operation, right, result in steps_of(example.response):
            assert eval(f"{left} {operation} {right}") % 10 != result
            mistakes.setdefault((left, operation, right), set()).add(result)
    assert len(mistakes) > 250  # nearly all of the 300 entries occur in 1,200 steps
    assert all(len(results) == 1 for results in mistakes.values())


def test_lazy_examples_end_early_with_a_guess(chain_tokenizer: Any) -> None:
    lazy = WorkedExampleNoise(hard_entries=0, hard_error=0, easy_error=0, lazy=1, garble=0)
    examples = worked_examples(chain_tokenizer, lazy, count=1000)
    for example in examples:
        assert re.fullmatch(r"([0-9] [-+*] [0-9] = [0-9] ; ){0,4}= [0-9] ;", example.response)
    right = sum(example.response.split()[-2] == example.prompt.answer for example in examples) / 1000
    assert 0.06 < right < 0.14  # a blind guess: 0.1, four standard deviations are 0.038


def test_the_default_noise_leaves_about_half_of_the_examples_right(chain_tokenizer: Any) -> None:
    examples = worked_examples(chain_tokenizer, WorkedExampleNoise(), count=2000)
    right = sum(example.response.split()[-2] == example.prompt.answer for example in examples) / 2000
    assert 0.38 < right < 0.55
    garbled = sum(len(steps_of(example.response)) != 6 or len(example.response_token_ids) != 37 for example in examples) / 2000
    assert 0.15 < garbled < 0.26  # 1 - 0.97^6 * 0.95 = 0.21


def test_examples_are_a_function_of_their_index_and_go_on_beyond_the_source(chain_tokenizer: Any) -> None:
    chains = ArithmeticChains(chain_tokenizer, num_operations=6, modulus=10, size=10, seed=1, split="train")
    examples = WorkedExamples(chains, chain_tokenizer, noise=WorkedExampleNoise(), seed=0)
    first = examples.batch(0, 30)
    assert first[5:8] == examples.batch(5, 3)
    assert first[0].prompt == first[10].prompt
    assert [example.response for example in first[:10]] != [example.response for example in first[10:20]]
    other = WorkedExamples(chains, chain_tokenizer, noise=WorkedExampleNoise(), seed=1).batch(0, 30)
    assert [example.response for example in first] != [example.response for example in other]


def test_noise_outside_zero_to_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lazy = 1\.5"):
        WorkedExampleNoise(lazy=1.5)


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


def test_a_larger_modulus_gets_its_numbers_and_a_vocabulary_divisible_by_eight(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(tmp_path, modulus=13)
    assert len(tokenizer) % 8 == 0
    prompts = ArithmeticChains(tokenizer, num_operations=4, modulus=13, size=50, seed=0, split="held_out").prompts(range(50))
    assert all(len(prompt.token_ids) == 12 and int(prompt.answer) == left_fold(prompt.text, 13) for prompt in prompts)
