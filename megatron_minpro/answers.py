"""Finding the final answer in a text, and reading it as an integer. Plain text work: no sympy, linear time."""

from __future__ import annotations

import re

_ANSWER_MARK = re.compile(r"answer\s*:", re.IGNORECASE)
_BOX = re.compile(r"\\f?boxed\s*\{")
_PLAIN_INTEGER = re.compile(r"([+-]?)([0-9]+)(?:\.0*)?")
_GROUPED_INTEGER = re.compile(r"([+-]?)([0-9]{1,3}(?:,[0-9]{3})+)(?:\.0*)?")
# Python refuses to read longer integers by default, and no label comes near.
_MAX_DIGITS = 4000


def last_answer_line(response: str, *, truncated: bool) -> str | None:
    """What follows the last "Answer:" of a response, up to the end of its line; None when there is none.

    Only the response may be passed: questions contain "Answer:" too. The mark counts in any case and with Markdown around it; an
    answer on the following line is accepted, an empty mark is not (DAPO, arXiv:2503.14476, reads the same expression).
    truncated: the response was cut off by the length limit. An answer that reaches the cut may have lost digits and is not accepted.
    """
    for mark in reversed(list(_ANSWER_MARK.finditer(response))):
        line, newline, _ = response[mark.end() :].lstrip("* \t\r\n").partition("\n")
        answer = line.strip().strip("*").strip()
        if answer:
            return None if truncated and not newline else answer
    return None


def last_boxed(response: str) -> str | None:
    """The content of the last complete \\boxed{...} (or \\fbox-like \\fboxed{...}), braces balanced; None when there is none.

    Escaped braces (\\{ and \\}) are text. A box that is never closed is no answer.
    """
    for box in reversed(list(_BOX.finditer(response))):
        depth, index = 1, box.end()
        while index < len(response) and depth:
            character = response[index]
            if character == "\\":
                index += 1  # the next character is escaped
            elif character == "{":
                depth += 1
            elif character == "}":
                depth -= 1
            index += 1
        if depth == 0:
            return response[box.end() : index - 1].strip()
    return None


def strip_decoration(answer: str) -> str:
    """An answer without dollar signs, math brackets, an outer box, a closing full stop and bold marks."""
    text = answer.strip()
    if (boxed := last_boxed(text)) is not None:
        text = boxed
    text = text.replace("\\$", "").replace("$", "").replace("**", "")
    for mark in ("\\(", "\\)", "\\[", "\\]", "\\displaystyle"):
        text = text.replace(mark, "")
    return text.strip().removesuffix(".").strip()


def as_integer(answer: str) -> int | None:
    """The integer an answer states, exactly, or None.

    "025", "27.0", "1,234", "$-3$" and "\\boxed{7}" are integers; "2^3" is left to sympy.
    """
    text = strip_decoration(answer).replace("\u2212", "-").replace("{,}", ",").replace("\\,", "").replace("\\!", "").strip()
    match = _PLAIN_INTEGER.fullmatch(text) or _GROUPED_INTEGER.fullmatch(text)
    if match is None or len(match[2]) > _MAX_DIGITS:
        return None
    return int(match[1] + match[2].replace(",", ""))
