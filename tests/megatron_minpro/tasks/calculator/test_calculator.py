"""The calculator's words, its worked examples, and a conversation with a model whose answers are given."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_minpro.batch.conversation import Conversation
from megatron_minpro.environments.conversations import hold_conversations
from megatron_minpro.environments.environment import make_environment
from megatron_minpro.tasks.arithmetic_chains.prompts import ArithmeticChains
from megatron_minpro.tasks.calculator.environment import reply
from megatron_minpro.tasks.calculator.reward import last_result
from megatron_minpro.tasks.calculator.worked_examples import steps_and_calls
from rollout.records import Generation, GenerationRequest, VersionSpan
from tests.megatron_minpro.conftest import unjudged

CALCULATOR = "megatron_minpro.tasks.calculator.environment:calculator"


@pytest.fixture
def chains(chain_tokenizer: Any) -> ArithmeticChains:
    return ArithmeticChains(chain_tokenizer, num_operations=3, modulus=10, size=100, seed=1, split="train")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("3 + 4 :", "= 7 ;"),
        ("3 + 4 = 7 ; 7 * 2 :", "= 4 ;"),
        ("2 - 5 :", "= 7 ;"),
        ("7 * :", ";"),
        ("7 = 2 :", ";"),
        (": : : :", ";"),
        (":", ";"),
    ],
)
def test_the_calculator_computes_the_last_three_words_or_says_nothing(said: str, expected: str) -> None:
    assert reply(said, modulus=10) == expected


def talk(
    tokenizer: Any, chains: ArithmeticChains, answers: Sequence[str], *, max_new_tokens: int = 40, max_calls: int = 16
) -> Conversation:
    """A conversation in which the model says `answers` one after the other, cut at its limit."""

    stops: set[tuple[int, ...]] = set()

    class Session:
        settings = SimpleNamespace(samples_per_call=None, is_rolling=False)

        def begin(self, request_ids: Sequence[str]) -> None: ...

        def end(self, request_id: str) -> None: ...

        async def generate(self, requests: Sequence[GenerationRequest], *, on_generation: None) -> list[Generation]:
            [request] = requests
            stops.add(request.stop_token_ids)
            said = tuple(tokenizer(answers[request.turn], add_special_tokens=False)["input_ids"])[: request.max_new_tokens]
            return [
                Generation(
                    request_id=request.request_id,
                    prompt_token_ids=request.prompt_token_ids,
                    response_token_ids=said,
                    engine_logprobs=(-1.0,) * len(said),
                    version_spans=(VersionSpan(policy_version=0, start=0, end=len(said)),),
                    finish_reason="stop",
                    latency_s=0.0,
                    num_retries=0,
                )
            ]

    [found] = asyncio.run(
        hold_conversations(
            make_environment(CALCULATOR, modulus=10, max_calls=max_calls),
            [chains[0]],
            session=Session(),  # type: ignore[arg-type]
            tokenizer=tokenizer,
            end_ids=(tokenizer.eos_token_id,),
            max_new_tokens=max_new_tokens,
            num_samples=1,
            request_prefix="step0",
            judge=unjudged,
        )
    )
    assert stops == {(tokenizer.convert_tokens_to_ids(":"),)}
    return found


def test_the_model_asks_and_goes_on_with_the_calculators_words(chain_tokenizer: Any, chains: ArithmeticChains) -> None:
    found = talk(chain_tokenizer, chains, ["3 + 4 :", "7 * 2 = 1 ; 1 - 5 :", "<|end|>"])
    assert found.text == "3 + 4 : = 7 ; 7 * 2 = 1 ; 1 - 5 : = 6 ;"
    words = [chain_tokenizer.decode([token]) for token in found.token_ids[len(chains[0].token_ids) :]]
    mask = found.loss_mask[len(chains[0].token_ids) :]
    assert [word for word, trained in zip(words, mask, strict=True) if not trained] == ["=", "7", ";", "=", "6", ";"]
    assert (found.num_response_tokens, len(found.generations), found.finish_reason) == (15, 3, "stop")
    assert not any(found.loss_mask[: len(chains[0].token_ids)])


@pytest.mark.parametrize("limits", [{"max_calls": 1}, {"max_new_tokens": 7}])
def test_a_conversation_without_end_is_cut_off(chain_tokenizer: Any, chains: ArithmeticChains, limits: dict[str, int]) -> None:
    found = talk(chain_tokenizer, chains, ["3 + 4 :"] * 3, **limits)
    assert (found.finish_reason, last_result(found.prompt, found).correct) == ("length", False)


def test_more_digits_than_python_reads_are_no_number(chain_tokenizer: Any, chains: ArithmeticChains) -> None:
    digits = "9" * 5000
    assert reply(f"{digits} + 1 :", modulus=10) == ";"
    said = Conversation.of_text(chains[0], f"1 + 1 = {digits} ;", finish_reason="stop", num_response_tokens=9)
    assert not last_result(chains[0], said).correct


def test_the_last_result_counts_whoever_computed_it(chain_tokenizer: Any, chains: ArithmeticChains) -> None:
    right, wrong = chains[0].answer, str((int(chains[0].answer) + 1) % 10)
    by_hand = talk(chain_tokenizer, chains, [f"1 + 1 = {right} ; <|end|>"])
    asked = talk(chain_tokenizer, chains, [f"{right} + 0 :", "<|end|>"])
    mistaken = talk(chain_tokenizer, chains, [f"{wrong} + 0 :", "<|end|>"])
    unfinished = talk(chain_tokenizer, chains, [f"1 + 1 = {right} <|end|>"])
    assert [last_result(said.prompt, said).reward for said in (by_hand, asked, mistaken, unfinished)] == [1.0, 1.0, 0.0, 0.0]


def test_worked_examples_without_errors_are_right_and_ask_as_often_as_told(chains: ArithmeticChains) -> None:
    examples = list(islice(steps_and_calls(chains, 0, calls=0.4, errors=0.0), 100))
    for index, (prompt, response) in enumerate(examples):
        assert prompt == chains[index].text
        said = Conversation.of_text(chains[index], response, finish_reason="stop", num_response_tokens=9)
        assert last_result(chains[index], said).correct
    share = sum(response.split().count(":") for _, response in examples) / 300
    assert share == pytest.approx(0.4, abs=0.08)  # 300 steps: three standard deviations
    assert examples == list(islice(steps_and_calls(chains, 0, calls=0.4, errors=0.0), 100))


def test_only_steps_by_hand_go_wrong(chains: ArithmeticChains) -> None:
    for _, response in islice(steps_and_calls(chains, 0, calls=0.5, errors=1.0), 100):
        for step in response.split(" ;"):
            match step.split():
                case [left, operation, right, ":", "=", result]:
                    assert reply(f"{left} {operation} {right} :", modulus=10) == f"= {result} ;"
    with pytest.raises(ValueError, match=r"^calls = 2, expected a probability$"):
        steps_and_calls(chains, 0, calls=2)
