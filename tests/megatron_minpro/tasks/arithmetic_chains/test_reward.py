from __future__ import annotations

import pytest

from megatron_minpro.batch.conversation import Conversation
from megatron_minpro.batch.prompt import Prompt
from megatron_minpro.tasks.arithmetic_chains.reward import final_step


@pytest.mark.parametrize(
    ("response", "finish_reason", "expected"),
    [
        ("3 + 4 = 7 ; 7 * 2 = 4 ;", "stop", 1.0),
        ("= 4 ;", "stop", 1.0),  # a lucky guess
        ("= 004 ;", "stop", 1.0),
        (f"= {'4' * 5000} ;", "stop", 0.0),  # more digits than Python reads
        ("3 + 4 = 7 ; 7 * 2 = 4 ;", "length", 0.0),
        ("3 + 4 = 7 ; 7 * 2 = 4 ;", "abort", 0.0),
        ("3 + 4 = 7 ; 7 * 2 = 4", "stop", 0.0),
        ("7 * 2 = 4 ; 3 + 4 = 7 ;", "stop", 0.0),  # the right number, but not last
        ("7 * 2 = 4 ; ;", "stop", 0.0),
        ("7 * 2 = 1 4 ;", "stop", 0.0),
        ("7 * 2 = : ;", "stop", 0.0),
        ("", "stop", 0.0),
    ],
)
def test_final_step_wants_the_right_last_result_and_a_clean_stop(response: str, finish_reason: str, expected: float) -> None:
    prompt = Prompt(prompt_id="0", text="", token_ids=(), answer="4", source="here")
    result = final_step(prompt, Conversation.of_text(prompt, response, finish_reason=finish_reason, num_response_tokens=9))
    assert (result.reward, result.correct, result.error) == (expected, expected == 1.0, None)
