from __future__ import annotations

import json

import pytest

from rollout.refusals import refusal


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (json.dumps({"error": {"message": "too long", "type": "BadRequestError"}}), "HTTP 400: too long"),  # OpenAI's form
        (json.dumps({"object": "error", "message": "too long"}), "HTTP 400: too long"),  # SGLang's and older vLLM's
        (json.dumps({"error": "too long"}), "HTTP 400: too long"),
        (json.dumps({"detail": [{"loc": ["body"]}]}), 'HTTP 400: {"detail": [{"loc": ["body"]}]}'),
        ('Traceback (most recent call last):\n  File "x.py", line 1\nRuntimeError: no\tmemory\n', "HTTP 400: RuntimeError: no memory"),
        ("", "HTTP 400: no reason given"),
        ("x" * 5000, "HTTP 400: " + "x" * 200 + "..."),
    ],
)
def test_a_refusal_is_one_short_line_with_the_reason(text: str, said: str) -> None:
    assert refusal(400, text) == said
