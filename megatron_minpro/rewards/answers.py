"""Finding the final answer in a text, reading it as a number, comparing it plainly. Text work alone: no sympy, linear time."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

AnswerStyle = Literal["dapo", "boxed"]  # where prompts ask for the answer: the last "Answer:" line, or the last \\boxed{...}

_ANSWER_MARK = re.compile(r"answer\s*:", re.IGNORECASE)
_BOX = re.compile(r"\\f?boxed\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # a brace, or an escaped character, which is none
_PLAIN_INTEGER = re.compile(r"([+-]?)([0-9]+)(?:\.0*)?")
_GROUPED_INTEGER = re.compile(r"([+-]?)([0-9]{1,3}(?:,[0-9]{3})+)(?:\.0*)?")
# Python refuses to read longer integers by default, and no label comes near.
_MAX_DIGITS = 4000
_ROUNDING = Fraction(1, 10**6)
_MAX_EXPONENT = 400  # beyond float64's range no answer lies; larger powers would be computed digit by digit
# 1.5, .5 or 1,234.5, each with e7 or \times 10^{7}; or a bare 10^{7}; a percent sign behind it.
_NUMBER = re.compile(
    r"(?P<sign>[+-]?)\s*(?:(?P<digits>[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?|[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
    r"(?:[eE](?P<e>[+-]?[0-9]+)|\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*(?P<times>\{\s*[+-]?[0-9]+\s*\}|[0-9]))?"
    r"|10\s*\^\s*(?P<power>\{\s*[+-]?[0-9]+\s*\}|[0-9]))\s*(?:\\?%)?"
)
_SCIENTIFIC = re.compile(r"(?<![A-Za-z\\0-9.])([0-9]+\.?[0-9]*|\.[0-9]+)[eE]\+?(-?[0-9]+)(?![0-9A-Za-z.^])")
_PRIMES = re.compile(r"\^\s*(?:\{(?:\s*\\prime)+\s*\}|\\prime\b)")
_SHORT_SUBSCRIPT = re.compile(r"_\{(\w)\}")
_FREE_SPACE = re.compile(r"\s+(?![0-9A-Za-z])|(?<![0-9A-Za-z])\s+")
_BASED_INTEGER = re.compile(r"([0-9][0-9A-Za-z]*)_\{?([0-9]+)\}?")


def extract_answer(response: str, *, style: AnswerStyle, truncated: bool) -> str | None:
    """The final answer where the prompt asked for it, never elsewhere; None when there is none. truncated: see last_answer_line."""
    return last_answer_line(response, truncated=truncated) if style == "dapo" else last_boxed(response)


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
    boxes = {box.end() - 1 for box in _BOX.finditer(response)}
    open_braces: list[int] = []
    start = end = -1
    # One pass: a degenerate response opens thousands of boxes and closes none.
    for brace in _BRACE.finditer(response):
        if brace[0] == "{":
            open_braces.append(brace.start())
        elif brace[0] == "}" and open_braces:
            opened = open_braces.pop()
            if opened in boxes and opened > start:
                start, end = opened, brace.start()
    return None if start < 0 else response[start + 1 : end].strip()


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


def as_number(answer: str) -> Fraction | None:
    """The number that an answer states in digits, exactly, or None: "4.5e33", "4.5 \\times 10^{33}", "10^{-5}", "1,234.50".

    A percent sign is read over: 12.5\\% gives 12.5. Everything else ("1/2", "\\pi", units) is left to sympy.
    """
    text = strip_decoration(answer).replace("\u2212", "-").replace("{,}", ",").replace("\\,", "").replace("\\!", "").strip()
    match = _NUMBER.fullmatch(text) if len(text) <= _MAX_DIGITS else None
    if match is None:
        return None
    exponent = int((match["e"] or match["times"] or match["power"] or "0").strip("{} "))
    if abs(exponent) > _MAX_EXPONENT:
        return None
    mantissa = Fraction(1) if match["digits"] is None else Fraction(match["digits"].replace(",", "").removesuffix("."))
    value = mantissa * Fraction(10) ** exponent
    return -value if match["sign"] == "-" else value


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """How far a number may lie from its label: up to relative times the label's size, or up to absolute. 0: it must be equal."""

    relative: float = 0.0
    absolute: float = 0.0

    def __post_init__(self) -> None:
        if not (0.0 <= self.relative < 1.0 and 0.0 <= self.absolute < float("inf")):
            raise ValueError(f"tolerance: relative {self.relative} and absolute {self.absolute}, expected 0 <= relative < 1, absolute >= 0")


EXACT = Tolerance()


def compare_plainly(label: str, answer: str, *, tolerance: Tolerance = EXACT) -> bool | None:
    """Whether an answer equals its label by text and digits alone; None when that cannot decide.

    Integers and numerals with a base ("52_8") are decided both ways. Other numbers are left open where rounding (up to 1e-6 of the label)
    or a percent sign on one side may explain the difference; different texts always are, as sympy may know more.
    """
    here, there = as_integer(label), as_integer(answer)
    if here is not None and there is not None and tolerance == EXACT:
        return here == there
    based, answered = (_BASED_INTEGER.fullmatch(strip_decoration(text).replace(" ", "")) for text in (label, answer))
    if based is not None and answered is not None:
        return (based[1].upper(), int(based[2])) == (answered[1].upper(), int(answered[2]))
    expected, found = as_number(label), as_number(answer)
    if expected is not None and found is not None:
        allowed = max(Fraction(str(tolerance.relative)) * abs(expected), Fraction(str(tolerance.absolute)))
        if abs(expected - found) <= allowed:
            return True
        explained = abs(expected - found) <= _ROUNDING * abs(expected) or ("%" in label) != ("%" in answer)
        return None if explained else False
    return True if _spelling(label) == _spelling(answer) else None


def for_math_verify(answer: str) -> str:
    """An answer in a spelling that math-verify reads: no decoration, powers of ten written out, one way to write primes and subscripts."""
    text = _SCIENTIFIC.sub(r"\1 \\times 10^{\2}", strip_decoration(answer))
    text = _PRIMES.sub(lambda match: "'" * match[0].count("\\prime"), text)
    return _SHORT_SUBSCRIPT.sub(r"_\1", text)


def _spelling(answer: str) -> str:
    """An answer without what has no meaning: white space, sizes of brackets and fractions, braces around one letter of a subscript."""
    text = strip_decoration(answer).replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    for mark in ("\\left", "\\right", "\\!", "\\,", "\\;", "\\ ", "~"):
        text = text.replace(mark, " ")
    return _FREE_SPACE.sub("", _SHORT_SUBSCRIPT.sub(r"_\1", text))
