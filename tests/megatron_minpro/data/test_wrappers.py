from __future__ import annotations

import pytest

from megatron_minpro.data.wrappers import BARE, BOXED_WRAPPER, DAPO_WRAPPER, WRAPPERS, unwrap, wrap

QUESTION = 'Let $x$ satisfy "Answer: $Answer" in {braces}.\n\nRemember: what is $x$?'


@pytest.mark.parametrize("wrapper", [*WRAPPERS.values(), "You are a careful mathematician. {question} Think first."])
def test_wrapping_twice_equals_wrapping_once(wrapper: str) -> None:
    once = wrapper.replace("{question}", QUESTION)
    assert wrap(QUESTION, wrapper) == once
    assert wrap(once, wrapper) == once
    assert wrap(wrapper.replace("{question}", once), wrapper) == once
    assert unwrap("  " + once.replace(" ", "\n ") + "\n", wrapper).split() == QUESTION.split()


def test_another_wrapper_replaces_the_one_that_is_there() -> None:
    assert wrap(DAPO_WRAPPER.replace("{question}", QUESTION), BOXED_WRAPPER) == BOXED_WRAPPER.replace("{question}", QUESTION)


def test_the_bare_wrapper_leaves_every_text_alone() -> None:
    text = DAPO_WRAPPER.replace("{question}", QUESTION)
    assert wrap(text, BARE) == text


@pytest.mark.parametrize(
    "text",
    [
        QUESTION,
        DAPO_WRAPPER.replace("{question}", QUESTION).removesuffix('"Answer:".'),  # cut off
        DAPO_WRAPPER.replace("{question}", QUESTION) + " Why?",
        "Solve the following math problem step by step. What is 1 + 1?",
        "",
    ],
)
def test_what_only_resembles_a_wrapper_is_part_of_the_question(text: str) -> None:
    assert unwrap(text, DAPO_WRAPPER) == text


def test_a_short_wrapper_is_never_taken_off() -> None:
    assert wrap("Q: is it 1?", "Q: {question}?") == "Q: Q: is it 1??"
