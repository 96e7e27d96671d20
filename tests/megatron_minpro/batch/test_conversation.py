"""Several answers of the model as one sequence."""

from __future__ import annotations

import pytest

from megatron_minpro.batch.conversation import Conversation, Turn, joined_spans
from megatron_minpro.batch.prompt import Prompt
from rollout.records import Generation, VersionSpan

PROMPT = Prompt(prompt_id="p0", text="?", token_ids=(1, 2), answer="", source="test")


def answer(prompt: tuple[int, ...], response: tuple[int, ...], *, version: int = 4) -> Generation:
    return Generation(
        request_id="r",
        prompt_token_ids=prompt,
        response_token_ids=response,
        engine_logprobs=tuple(-float(token) for token in response),
        version_spans=(VersionSpan(policy_version=version, start=0, end=len(response)),),
        finish_reason="stop",
        latency_s=0.0,
        num_retries=0,
    )


def conversation(*generations: Generation, closing: tuple[int, ...] = ()) -> Conversation:
    return Conversation(
        prompt=PROMPT,
        turns=(Turn(author="model", text="a"), Turn(author="environment", text="b"), Turn(author="model", text="c")),
        text="abc",
        finish_reason="stop",
        num_response_tokens=3,
        generations=generations,
        closing_token_ids=closing,
    )


def test_tokens_and_mask_of_two_answers_by_hand() -> None:
    found = conversation(answer((1, 2), (3, 4)), answer((1, 2, 3, 4, 5), (6,), version=5), closing=(7,))
    assert found.token_ids == (1, 2, 3, 4, 5, 6, 7)
    assert found.loss_mask == [False, False, True, True, False, True, False]
    assert found.engine_logprobs == [-3.0, -4.0, -6.0]
    assert [(span.policy_version, span.start, span.end) for span in found.version_spans] == [(4, 0, 2), (5, 2, 3)]
    assert found.response == "c"


def test_spans_of_one_version_become_one() -> None:
    def spans(*described: tuple[int, int, int]) -> list[VersionSpan]:
        return [VersionSpan(policy_version=version, start=start, end=end) for version, start, end in described]

    assert joined_spans([spans((4, 0, 2)), spans((4, 0, 1), (5, 1, 3)), spans((5, 0, 2), (4, 2, 3))]) == tuple(
        spans((4, 0, 3), (5, 3, 7), (4, 7, 8))
    )


@pytest.mark.parametrize("second", [(1, 2, 3, 9, 5), (1, 2, 3)])
def test_an_answer_to_other_tokens_than_stand_before_it_is_refused(second: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^p0: answer 1 of the model was given to other tokens .* \(token 3 differs\)"):
        conversation(answer((1, 2), (3, 4)), answer(second, (6,)))
