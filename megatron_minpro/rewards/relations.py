"""Equations, chains and inequalities as answers: which side of them is the answer, and which of them is none."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from fractions import Fraction

from megatron_minpro.rewards.quantities import numbers_equal, read_quantity

_EQUALS = re.compile(r":?==?|\\equiv(?![A-Za-z])")
_APPROXIMATES = re.compile(r"\\approx(?![A-Za-z])")
_INEQUALITY = re.compile(r"\\le(?![A-Za-z])|\\ge(?![A-Za-z])|<|>")
_TOKEN = re.compile(r"\\[{}]|\\[A-Za-z]+|\\.|.", re.DOTALL)
_OPENING, _CLOSING = (
    frozenset(("(", "[", "{", "\\{", "\\lfloor", "\\lceil", "\\langle")),
    frozenset((")", "]", "}", "\\}", "\\rfloor", "\\rceil", "\\rangle")),
)
_SEPARATOR = re.compile(
    r",|;|\\text\s*\{\s*,?\s*(?:and|or)\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])|\\(?:land|lor|vee|wedge)(?![A-Za-z])"
)

_GREEK = (
    r"\\(?:alpha|beta|gamma|delta|epsilon|varepsilon|zeta|eta|theta|vartheta|iota|kappa|lambda|mu|nu|xi|rho|sigma|tau|phi|varphi|chi|psi"
    r"|omega|ell|Gamma|Delta|Theta|Lambda|Xi|Pi|Sigma|Phi|Psi|Omega)"
)
_INDEX = r"(?:\s*_\s*(?:\{[^{}]*\}|[A-Za-z0-9]|\\[A-Za-z]+))?(?:'|\^\s*\\prime|\^\s*\{\s*(?:\\prime\s*)+\}|\^\s*\*)*"
_LETTER = rf"(?:[A-Za-z]|{_GREEK}|\\(?:hat|bar|vec|tilde|overline|mathbf|mathrm|mathcal|mathbb|text)\s*\{{[^{{}}]*\}}){_INDEX}"
_LETTERS = re.compile(rf"\s*({_LETTER})\s*")
_CALL = re.compile(
    rf"\s*(?:{_LETTER}|\\(?:Pr|gcd|max|min|det|deg|operatorname\s*\{{[^{{}}]*\}})|gcd|lcm|max|min|Var|Cov|Pr|log_[0-9]+)\s*(?:\((?:[^()]|\([^()]*\))*\)|\[[^\[\]]*\])\s*"
)
_WORDS = re.compile(r"\s*(?:[A-Za-z][A-Za-z'’ .,:-]*[A-Za-z.:]|[\u4e00-\u9fff]+)\s*")
_NAMED = re.compile(
    r"\s*(?:\|.*\||\\(?:lim|sum|prod|int|max|min|sup|inf|angle|triangle|measuredangle|frac\s*\{\s*d|gcd|lcm|arg|det|Re|Im|mathbb|lfloor|lceil"
    r"|sphericalangle|oint|iint|Delta|partial|overline|widehat|text)(?![a-z]{3}).*"
    r"|\[[A-Z]+\]|\\(?:sin|cos|tan|cot|sec|csc)\s*(?:\(?\s*(?:[A-Z]|\\[A-Za-z]+)\s*[A-Z ]*\)?)"
    r"|[A-Z]{2,}(?:\s*[+-]\s*[A-Z]{2,}|\s*/\s*[A-Z]{2,}|\^\{?2\}?)*"
    r"|m\s*\\angle.*)\s*"
)  # fmt: skip
_CURVE_VARIABLES = frozenset("xyzt")


def split_top(text: str, separator: re.Pattern[str]) -> list[tuple[str, str]]:
    """The parts of a text between separators that stand in no bracket.

    Args:
        text: LaTeX as typography.as_latex writes it.
        separator: what splits; it must not match the empty text.

    Returns:
        (part, the separator behind it) in order; the last separator is empty.
    """
    parts, start = [], 0
    for found in _top_matches(text, separator):
        parts.append((text[start : found.start()].strip(), found[0]))
        start = found.end()
    return [*parts, (text[start:].strip(), "")]


def list_elements(text: str) -> list[str]:
    """The elements of a list without brackets: "1, 2 and 3" gives three. Empty parts are left out, as in "3, 5, and 7"."""
    return [part for part, _ in split_top(text, _SEPARATOR) if part and part != "\\text{}"]


def is_equation(text: str) -> bool:
    """Whether an equals sign stands outside of all brackets."""
    return next(_top_matches(text, _EQUALS), None) is not None


def answer_of_equation(text: str) -> str | None:
    """The side of an equation that answers a question for a value.

    "x = 42" and "f(2) = 42" name what was asked, "m + n = 42" and "6 \\cdot 7 = 42" state it; all give "42". "x^2 = 42" and "2x = 42" are
    problems of their own, "1 + 1 = 42" is false: they give None.

    Args:
        text: LaTeX as typography.as_latex writes it.

    Returns:
        The answer's side; the text itself when it is no equation; None when the equation answers nothing.
    """
    sides = [side for side, _ in split_top(text, _EQUALS)]
    if len(sides) == 1:
        return text
    if not sides[-1] or (not sides[0] and len(sides) == 2):
        return " ".join(side for side in sides if side)  # "= 42" and "42 ="
    sides = [side for side in sides if side]
    values = [_closed_value(side) for side in sides]
    numbers = [value for value in values if value is not None]
    if any(not _agree(here, there) for here, there in itertools.pairwise(numbers)):
        return None
    if values[0] is not None:
        if all(value is not None for value in values):
            return sides[-1]  # a true chain of numbers
        return sides[0] if len(sides) == 2 and is_name(sides[1]) else None if _has_unknown(sides[1]) else sides[-1]
    return sides[-1] if is_name(sides[0]) or not _has_unknown(sides[0]) else None


def sides_to_check(text: str) -> list[tuple[str, str]]:
    """The pairs of neighbours in a chain of equations that hold no variable and that exact arithmetic cannot compare: "\\log_2 8 = 3"."""
    sides = [side for side, _ in split_top(text, _EQUALS) if side]
    return [
        (here, there)
        for here, there in itertools.pairwise(sides)
        if (_closed_value(here) is None or _closed_value(there) is None)
        and not any(is_name(side) or _has_unknown(side) or not re.search(r"[0-9]|\\pi", side) for side in (here, there))
    ]


def is_name(side: str) -> bool:
    """Whether a side of an equation only names what was asked: a variable, a function's value, words, or a sum or product of variables."""
    side = side.strip()
    if _CALL.fullmatch(side) or _LETTERS.fullmatch(side) or (_WORDS.fullmatch(side) and not _is_product(side)) or _NAMED.fullmatch(side):
        return True
    if side.startswith("(") and side.endswith(")") and len(list_elements(side[1:-1])) > 1:
        return all(_LETTERS.fullmatch(part) for part in list_elements(side[1:-1]))
    letters: list[str] = []
    for number, term in enumerate(re.split(r"[+-]|\\pm", side)):
        if not term.strip():
            return False if number == 0 else _general_name(side)
        for factor in re.split(r"/|\\cdot|\\times|\*", term):
            read = _factor_letters(factor)
            if read is None:
                return _general_name(side)
            letters += read
    return len(letters) > 1 and len(set(letters)) == len(letters)


def as_interval(text: str) -> tuple[str, str] | None:
    """An inequality in one variable as an interval: "1 \\le x < 2" gives "[1,2)", "x > 3 or x < 0" gives a union.

    Args:
        text: LaTeX as typography.as_latex writes it.

    Returns:
        The variable and the interval; None for anything else.
    """
    pieces = split_top(text, re.compile(r"\\text\s*\{\s*,?\s*or\s*\}|(?<![A-Za-z\\])or(?![A-Za-z])|\\(?:lor|vee)(?![A-Za-z])"))
    intervals = []
    variables = set()
    for piece, _ in pieces:
        found = _one_interval(piece)
        if found is None:
            return None
        variables.add(found[0])
        intervals.append(found[1])
    return (variables.pop(), "\\cup ".join(intervals)) if len(variables) == 1 else None


def _one_interval(text: str) -> tuple[str, str] | None:
    parts = split_top(text, _INEQUALITY)
    if len(parts) == 2:
        (left, sign), (right, _) = parts
        if _LETTERS.fullmatch(right) and not _LETTERS.fullmatch(left):
            left, right, sign = right, left, {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}[sign]
        if not _LETTERS.fullmatch(left) or not right or _LETTERS.fullmatch(right):
            return None
        if sign in ("<", "\\le"):
            return left, f"(-\\infty,{right}{']' if sign != '<' else ')'}"
        return left, f"{'[' if sign != '>' else '('}{right},\\infty)"
    if len(parts) != 3 or not _LETTERS.fullmatch(parts[1][0]):
        return None
    (low, first), (name, second), (high, _) = parts
    if {first, second} <= {">", "\\ge"}:
        low, first, second, high = (
            high,
            second.replace(">", "<").replace("\\ge", "\\le"),
            first.replace(">", "<").replace("\\ge", "\\le"),
            low,
        )
    if not {first, second} <= {"<", "\\le"} or not low or not high:
        return None
    return name, _bracketed(low, first, second, high)


def _bracketed(low: str, first: str, second: str, high: str) -> str:
    opening, closing = "(" if first == "<" else "[", ")" if second == "<" else "]"
    return f"{opening}{low},{high}{closing}"


def approximated(text: str) -> list[str]:
    """The sides of "\\sqrt{2} \\approx 1.414", each of which may be meant; the text alone when it holds no such sign."""
    return [side for side, _ in split_top(text, _APPROXIMATES) if side]


def _top_matches(text: str, pattern: re.Pattern[str]) -> Iterator[re.Match[str]]:
    """Matches of a pattern outside of all brackets. Square and round brackets may close each other, as in [0,1)."""
    depth, at = 0, 0
    while at < len(text):
        if depth == 0 and (found := pattern.match(text, at)) is not None and found.end() > at and not _part_of_relation(text, found):
            yield found
            at = found.end()
            continue
        token = _TOKEN.match(text, at)
        assert token is not None
        depth = depth + 1 if token[0] in _OPENING else max(0, depth - 1) if token[0] in _CLOSING else depth
        at = token.end()


def _part_of_relation(text: str, found: re.Match[str]) -> bool:
    """An equals sign of "!=", "<=" or ">="."""
    return found[0] == "=" and found.start() > 0 and text[found.start() - 1] in "!<>"


def _closed_value(side: str) -> Fraction | None:
    quantity = read_quantity(side)
    return None if quantity is None else quantity.value / 100 if quantity.percent else quantity.value


def _agree(here: Fraction, there: Fraction) -> bool:
    return numbers_equal(here, there, True, relative=Fraction(0), absolute=Fraction(0)) or here == 100 * there or there == 100 * here


def _has_unknown(side: str) -> bool:
    """Whether a side holds a variable: letters that are no command, no function and no constant."""
    bare = re.sub(r"\\(?:text|mathrm|mbox|operatorname)\s*\{[^{}]*\}|\\[A-Za-z]+", " ", side)
    return any(word not in ("e", "i", "log", "ln", "sin", "cos", "tan", "C", "P") for word in re.findall(r"[A-Za-z]+", bare))


def _is_product(side: str) -> bool:
    """Letters without a space that may be a product of variables rather than a word: "xy", "ab"."""
    return " " not in side.strip() and len(side.strip()) <= 3 and side.strip().islower()


def _factor_letters(factor: str) -> list[str] | None:
    letters, at = [], 0
    if (call := _CALL.fullmatch(factor)) is not None:
        return [call[0].strip()]
    if (named := _NAMED.fullmatch(factor)) is not None:
        return [named[0].strip()]
    while at < len(factor):
        letter = _LETTERS.match(factor, at)
        if letter is None:
            return None
        letters.append(letter[1])
        at = letter.end()
    return letters or None


def _general_name(side: str) -> bool:
    """An expression in several unknowns, such as "a^2+b^2" or "10a+b". A single unknown, and a curve in x, y, z, is not one."""
    bare = re.sub(r"\\[A-Za-z]+", " ", side)
    letters = set(re.findall(r"[A-Za-z]", bare))
    constant = re.search(r"(?:^|[+-])\s*[0-9.]+\s*(?:[+-]|$)", side)
    return len(letters) > 1 and not letters <= _CURVE_VARIABLES and constant is None
