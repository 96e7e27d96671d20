"""The error text of a server that refuses a request, in one line."""

from __future__ import annotations

import json

_LONGEST = 200


def refusal(status: int, text: str) -> str:
    """The status and the reason of an HTTP answer that is none.

    Args:
        status: HTTP status.
        text: the body: JSON with an error message inside, as OpenAI's API has it, or anything else, such as a traceback or a page.
    """
    lines = (_message(text) or text).strip().splitlines()
    last = " ".join(lines[-1].split()) if lines else "no reason given"  # of a traceback the last line tells the error
    return f"HTTP {status}: {last if len(last) <= _LONGEST else last[:_LONGEST] + '...'}"


def _message(text: str) -> str | None:
    try:
        answer = json.loads(text)
    except ValueError:
        return None
    for key in ("error", "message", "detail"):
        if isinstance(answer, dict) and key in answer:
            answer = answer[key]
    if isinstance(answer, dict) and isinstance(answer.get("message"), str):
        return answer["message"]
    return answer if isinstance(answer, str) else None
