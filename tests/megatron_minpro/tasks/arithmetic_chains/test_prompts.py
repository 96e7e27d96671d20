from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_minpro.tasks.arithmetic_chains.prompts import ArithmeticChains, permuted
from megatron_minpro.tasks.arithmetic_chains.tokenizer import build_tokenizer


def left_fold(text: str, modulus: int) -> int:
    """Independent of the implementation: Python evaluates the parenthesised expression over the integers, reduced once at the end."""
    first, *rest = text.removesuffix(" :").split()
    expression = first
    for operation, value in zip(rest[::2], rest[1::2], strict=True):
        expression = f"({expression} {operation} {value})"
    return eval(expression) % modulus


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


def test_the_splits_are_all_chains_and_never_overlap(chain_tokenizer: Any) -> None:
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


def test_a_larger_modulus_gets_its_numbers_and_a_vocabulary_of_eights(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(tmp_path, modulus=13)
    assert len(tokenizer) % 8 == 0
    prompts = ArithmeticChains(tokenizer, num_operations=4, modulus=13, size=50, seed=0, split="held_out").prompts(range(50))
    assert all(len(prompt.token_ids) == 12 and int(prompt.answer) == left_fold(prompt.text, 13) for prompt in prompts)
