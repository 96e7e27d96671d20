from __future__ import annotations

import re
from itertools import islice
from typing import Any

import pytest

from megatron_minpro.batch.conversation import Conversation
from megatron_minpro.data.prompts import PromptList
from megatron_minpro.tasks.arithmetic_chains.prompts import ArithmeticChains
from megatron_minpro.tasks.arithmetic_chains.reward import final_step
from megatron_minpro.tasks.arithmetic_chains.worked_examples import noisy_solutions

NO_NOISE = {"hard_entries": 0.0, "hard_error": 0.0, "easy_error": 0.0, "lazy": 0.0, "garble": 0.0}


def chains(tokenizer: Any, *, size: int = 5000) -> ArithmeticChains:
    return ArithmeticChains(tokenizer, num_operations=6, modulus=10, size=size, seed=1, split="train")


def responses(tokenizer: Any, noise: dict[str, float], *, count: int = 200) -> list[str]:
    return [response for _, response in islice(noisy_solutions(chains(tokenizer), 0, **noise), count)]


def steps_of(response: str) -> list[tuple[int, str, int, int]]:
    steps = re.findall(r"([0-9]) ([-+*]) ([0-9]) = ([0-9]) ;", response)
    return [(int(left), operation, int(right), int(result)) for left, operation, right, result in steps]


def test_without_noise_every_step_is_right_and_the_reward_is_one(chain_tokenizer: Any) -> None:
    source = chains(chain_tokenizer)
    for index, (text, response) in enumerate(islice(noisy_solutions(source, 0, **NO_NOISE), 200)):
        assert text == source[index].text
        assert len(response.split()) == 36  # six steps of six words
        for left, operation, right, result in steps_of(response):
            assert eval(f"{left} {operation} {right}") % 10 == result
        said = Conversation.of_text(source[index], response, finish_reason="stop", num_response_tokens=9)
        assert final_step(source[index], said).correct


def test_on_hard_entries_the_same_mistake_is_made_everywhere(chain_tokenizer: Any) -> None:
    always_wrong = {**NO_NOISE, "hard_entries": 1, "hard_error": 1, "favourite_share": 1}
    mistakes: dict[tuple[int, str, int], set[int]] = {}
    for response in responses(chain_tokenizer, always_wrong):
        for left, operation, right, result in steps_of(response):
            assert eval(f"{left} {operation} {right}") % 10 != result
            mistakes.setdefault((left, operation, right), set()).add(result)
    assert len(mistakes) > 250  # nearly all of the 300 entries occur in 1,200 steps
    assert all(len(results) == 1 for results in mistakes.values())


def test_lazy_examples_end_early_with_a_guess(chain_tokenizer: Any) -> None:
    source = chains(chain_tokenizer)
    written = responses(chain_tokenizer, {**NO_NOISE, "lazy": 1}, count=1000)
    assert all(re.fullmatch(r"([0-9] [-+*] [0-9] = [0-9] ; ){0,4}= [0-9] ;", response) for response in written)
    right = sum(int(response.split()[-2]) == source.chain(index).result for index, response in enumerate(written)) / 1000
    assert 0.06 < right < 0.14  # a blind guess: 0.1, four standard deviations are 0.038


def test_the_default_noise_leaves_about_half_of_the_examples_right(chain_tokenizer: Any) -> None:
    source = chains(chain_tokenizer)
    written = responses(chain_tokenizer, {}, count=2000)
    right = sum(response.split()[-2] == str(source.chain(index).result) for index, response in enumerate(written)) / 2000
    assert 0.38 < right < 0.55
    garbled = sum(len(steps_of(response)) != 6 or len(response.split()) != 36 for response in written) / 2000
    assert 0.15 < garbled < 0.26  # 1 - 0.97^6 * 0.95 = 0.21


def test_examples_depend_on_seed_and_index_and_go_on_beyond_the_source(chain_tokenizer: Any) -> None:
    few = chains(chain_tokenizer, size=10)
    first, again, other = (list(islice(noisy_solutions(few, seed), 30)) for seed in (0, 0, 1))
    assert first == again != other
    assert [text for text, _ in first] == [few.chain(index % 10).text for index in range(30)]
    assert [response for _, response in first[:10]] != [response for _, response in first[10:20]]


def test_noise_outside_zero_to_one_and_other_prompts_are_refused(chain_tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"lazy = 1\.5, expected a probability"):
        noisy_solutions(chains(chain_tokenizer), 0, lazy=1.5)
    with pytest.raises(ValueError, match="expected prompts of that task, found other"):
        noisy_solutions(PromptList(name="other", prompts=()), 0)
