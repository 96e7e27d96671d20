"""A sampled response as trackers show it: its facts in one line, and its texts cut to a length that a screen takes."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

TEXTS = ("prompt", "response", "answer", "extracted")  # of a line of rollouts/step_....jsonl
_SHOWN_CHARACTERS = 4000


def facts_line(response: Mapping[str, Any]) -> str:
    """Its numbers. response: a line of rollouts/step_....jsonl."""
    facts = [
        f"reward {response['reward']:g}",
        f"advantage {response['advantage']:.3g}",
        f"{response['num_response_tokens']} tokens",
        f"finished by {response['finish_reason']}",
        f"policy version {response['policy_version']}",
    ]
    return ", ".join(facts)


def shown_texts(response: Mapping[str, Any]) -> dict[str, str]:
    """Each of TEXTS, cut; what is left out is counted."""
    return {name: _cut(str(response[name])) for name in TEXTS}


def _cut(text: str) -> str:
    return text[:_SHOWN_CHARACTERS] + (f" ... and {len(text) - _SHOWN_CHARACTERS:,} characters" if len(text) > _SHOWN_CHARACTERS else "")


def markdown(response: Mapping[str, Any]) -> str:
    """All of it. What came from a model or a data set stands in code blocks, so nothing in it is markup."""
    parts = [f"{name}:\n\n{_code_block(text)}" for name, text in shown_texts(response).items()]
    return "\n\n".join([facts_line(response), *parts])


def html_text(response: Mapping[str, Any]) -> str:
    """All of it as HTML. Everything is escaped, so nothing in it is markup."""
    parts = [f'<p>{name}:</p><pre style="white-space: pre-wrap">{html.escape(text)}</pre>' for name, text in shown_texts(response).items()]
    return "\n".join([f"<p>{html.escape(facts_line(response))}</p>", *parts])


def _code_block(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])
