"""Wrappers: the instructions around a question. A question that comes wrapped already is unwrapped first, so that none is sent twice."""

from __future__ import annotations

import functools
import re

# The wrapper of DAPO-Math-17K as published runs use it (arXiv:2503.14476); the answer is then read from the "Answer:" line.
DAPO_WRAPPER = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: $Answer "
    "(without quotes) where $Answer is the answer to the problem.\n\n{question}\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)
BOXED_WRAPPER = "{question}\n\nPlease reason step by step, and put your final answer within \\boxed{}."
WRAPPERS = {"dapo": DAPO_WRAPPER, "boxed": BOXED_WRAPPER}

BARE = "{question}"  # the question alone
_FEWEST_WORDS = 4  # fewer words around {question} may be a part of the question itself


def wrap(question: str, wrapper: str) -> str:
    """The text that is sent: `wrapper` around the bare question.

    Args:
        question: with or without a wrapper around it.
        wrapper: a text that contains {question} once. The bare wrapper leaves the question as it is.
    """
    return question if wrapper == BARE else wrapper.replace("{question}", unwrap(question, wrapper))


def unwrap(question: str, wrapper: str) -> str:
    """The question without the known wrappers, and without `wrapper`, however often they stand around it.

    Published data sets hold prompts in either form: DAPO-Math-17K's own files come wrapped, copies of it come bare. White space may
    differ from the wrapper's.
    """
    bare = question
    while (inner := _inside_any(bare, wrapper)) is not None:
        bare = inner
    return bare


def _inside_any(text: str, wrapper: str) -> str | None:
    """What stands inside the first wrapper that matches, None when none does."""
    for known in (*WRAPPERS.values(), wrapper):
        before, after = _around(known)
        start, end = before.match(text), after.search(text)
        if start is not None and end is not None and start.end() <= end.start() and len(known.split()) > _FEWEST_WORDS:
            return text[start.end() : end.start()].strip()
    return None


@functools.lru_cache(maxsize=16)
def _around(wrapper: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Patterns of what stands before the question, from the start on, and behind it, up to the end."""
    before, after = (r"\s+".join(map(re.escape, part.split())) for part in wrapper.split("{question}"))
    return re.compile(rf"\s*{before}"), re.compile(rf"{after}\s*\Z")
