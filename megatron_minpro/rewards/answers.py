"""Finding the final answer in a text, reading it as a number, comparing it plainly. Text work alone: no sympy, linear time."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from megatron_minpro.rewards.quantities import read_quantity
from megatron_minpro.rewards.relations import list_elements
from megatron_minpro.rewards.typography import as_latex

AnswerStyle = Literal["dapo", "boxed"]  # where prompts ask for the answer: the last "Answer:" line, or the last \\boxed{...}

# Full-width and other colons count; Markdown or a closing brace may stand between the word and its colon.
_ANSWER_MARK = re.compile(r"answer[\s*_`}]*[:\uff1a\ufe55\ufe13\u2236]", re.IGNORECASE)
_BOX = re.compile(r"\\f?boxed\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # a brace, or an escaped character, which is none
_RULES = re.compile(r"(?:[-=_*~#` \t\r}]*\n(?:[ \t]*>)*)*[*_`#} \t\r]*")  # blank lines, Markdown rules, and what may stand before an answer
_BLOCKS = (("$$", "$$"), ("\\[", "\\]"), ("\\(", "\\)"), ("```", "```"))
_ENVIRONMENT = re.compile(r"\\begin\{([A-Za-z]+\*?)\}")
_FENCE = re.compile(r"```[A-Za-z]*[ \t]*\n?")
_ANNOUNCES = re.compile(r"[^0-9\\$]*(?:\b(?:is|are|equals|be)|:|=)[\s*_]*")
# What may stand between boxes that are one answer together: "and", commas, the names of variables.
_BETWEEN_BOXES = re.compile(
    r"(?:\s|[$,;.&*_]|\\[()\[\],;:! \\]|\\q?quad(?![A-Za-z])|\\(?:text|mbox|textbf)\s*\{\s*,?\s*(?:and|or)?\s*,?\s*\}|\b(?:and|or)\b"
    r"|\\(?:land|lor)(?![A-Za-z])|[A-Za-z](?:_\{?\w\}?)?\s*=)*"
)
_MAX_BETWEEN_BOXES = 80
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
_SCIENTIFIC = re.compile(r"(?<![A-Za-z\\0-9.])([0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE]\+?(-?[0-9]+)(?![0-9A-Za-z.^])")
_PRIMES = re.compile(r"\^\s*(?:\{(?:\s*\\prime)+\s*\}|\\prime\b)")
_SHORT_SUBSCRIPT = re.compile(r"_\{(\w)\}")
_FREE_SPACE = re.compile(r" (?![0-9A-Za-z])|(?<![0-9A-Za-z]) ")
_BASED_INTEGER = re.compile(r"([0-9][0-9A-Za-z]*)_\{?([0-9]+)\}?")


def extract_answer(response: str, *, style: AnswerStyle, truncated: bool, label: str = "") -> str | None:
    """The final answer where the prompt asked for it, never elsewhere.

    Args:
        response: the model's text alone; questions contain "Answer:" too.
        style: where the prompt asked for the answer.
        truncated: the response was cut off by the length limit; see last_answer_line.
        label: what the answer will be compared with. A label of several parts may be answered by several boxes.

    Returns:
        The answer's text, or None when there is none.
    """
    answer = last_answer_line(response, truncated=truncated) if style == "dapo" else response
    if answer is None:
        return None
    if (joined := _joined_boxes(answer, label)) is not None:
        return joined
    return answer if style == "dapo" else last_boxed(response)


def last_answer_line(response: str, *, truncated: bool) -> str | None:
    """What follows the last "Answer:" of a response: the rest of the line, or the formula or line that comes next.

    The mark counts in any case, with any colon and with Markdown around it; an empty mark does not count (DAPO, arXiv:2503.14476, reads
    the same expression).

    Args:
        response: the model's text alone; questions contain "Answer:" too.
        truncated: the response was cut off by the length limit. An answer that reaches the cut may have lost digits and is not accepted.

    Returns:
        The answer's text, or None when there is none.
    """
    end = len(response)
    for mark in reversed(list(_ANSWER_MARK.finditer(response))):
        answer, whole = _after_mark(response[mark.end() : end])
        if answer:
            return None if truncated and not whole and end == len(response) else answer
        end = mark.start()
    return None


def _after_mark(text: str) -> tuple[str, bool]:
    """The answer that a text begins with, and whether something follows its last line."""
    start = _past(_RULES, text, 0)
    announced = _ANNOUNCES.fullmatch(text, start, _line_end(text, start))
    if announced is not None and _line_end(text, start) < len(text):  # "the value is", and a formula below
        start = _past(_RULES, text, _line_end(text, start))
    end = _line_end(text, _block_end(text, start))
    answer = _FENCE.sub("", text[start:end]).strip().strip("*_` \t\r\n")
    if not answer.strip("$ \n"):
        return "", True
    return answer, end < len(text)


def _block_end(text: str, start: int) -> int:
    """Where the formula that starts here ends; `start` itself when none does, or when it is never closed."""
    for opening, closing in _BLOCKS:
        if text.startswith(opening, start):
            return max(start, text.find(closing, start + len(opening)) + len(closing) - 1)
    if text.startswith("$", start) and text[start + 1 : start + 2].isspace():
        return max(start, text.find("$", start + 1))
    environment = _ENVIRONMENT.match(text, start)
    if environment is not None:
        return max(start, text.find(f"\\end{{{environment[1]}}}", start))
    box = _BOX.match(text, start)
    if box is not None:
        depth = 0
        for brace in _BRACE.finditer(text, box.end() - 1):
            depth += (brace[0] == "{") - (brace[0] == "}")
            if depth == 0:
                return brace.start()
    return start


def _line_end(text: str, start: int) -> int:
    end = text.find("\n", start)
    return len(text) if end < 0 else end


def _past(pattern: re.Pattern[str], text: str, start: int) -> int:
    found = pattern.match(text, start)
    return start if found is None else found.end()


def last_boxed(response: str) -> str | None:
    """The content of the last complete \\boxed{...} (or \\fbox-like \\fboxed{...}), braces balanced; None when there is none.

    Escaped braces (\\{ and \\}) are text. A box that is never closed is no answer.
    """
    boxes = _complete_boxes(response)
    if not boxes:
        return None
    start, end = max(boxes)
    return response[start + 1 : end].strip()


def _complete_boxes(response: str) -> list[tuple[int, int]]:
    """Places of the opening and closing brace of each complete box, in the order in which they close."""
    opened = {box.end() - 1 for box in _BOX.finditer(response)}
    open_braces: list[int] = []
    boxes = []
    # One pass: a degenerate response opens thousands of boxes and closes none.
    for brace in _BRACE.finditer(response):
        if brace[0] == "{":
            open_braces.append(brace.start())
        elif brace[0] == "}" and open_braces and (start := open_braces.pop()) in opened:
            boxes.append((start, brace.start()))
    return boxes


def _joined_boxes(response: str, label: str) -> str | None:
    """The boxes that answer a label of several parts together, as one list; None where the last box alone is the answer.

    Boxes with nothing but "and", commas or names of variables between them are one answer. Boxes in several sentences are one answer when
    they are as many as the label has parts.
    """
    wanted = num_parts(label)
    if wanted < 2:
        return None
    boxes = sorted(_complete_boxes(response))
    inner = [box for number, box in enumerate(boxes) if number + 1 == len(boxes) or boxes[number + 1][0] > box[1]]
    if len(inner) < 2 or num_parts(response[inner[-1][0] + 1 : inner[-1][1]]) >= wanted:
        return None
    first = len(inner) - 1
    while first > 0 and _connected(response[inner[first - 1][1] + 1 : inner[first][0]]):
        first -= 1
    contents = [response[start + 1 : end].strip() for start, end in inner]
    if first < len(inner) - 1:
        return ", ".join(contents[first:])
    distinct = list(dict.fromkeys(contents))
    return ", ".join(distinct) if len(distinct) == wanted else None


def _connected(between: str) -> bool:
    between = between.removesuffix("\\boxed").removesuffix("\\fboxed")
    return len(between) <= _MAX_BETWEEN_BOXES and _BETWEEN_BOXES.fullmatch(between) is not None


def num_parts(label: str) -> int:
    """How many answers a label holds: 2 for "(98,2),(99,503)" and for "1 \\text{ or } 2", 1 for "(1,2)" and for "1,234"."""
    text = as_latex(label)
    if text.startswith("\\{") and text.endswith("\\}"):
        text = text[2:-2]
    return 1 if read_quantity(text) is not None else len(list_elements(text))


def strip_decoration(answer: str) -> str:
    """An answer without dollar signs, math brackets, an outer box, a closing full stop and bold marks."""
    text = answer.strip()
    if (boxed := last_boxed(text)) is not None:
        text = boxed
    text = text.replace("\\$", "").strip("*").strip().removeprefix("$").removesuffix("$").replace("$", " ")
    for mark in ("\\(", "\\)", "\\[", "\\]", "\\displaystyle"):
        text = text.replace(mark, "")
    return text.strip().removesuffix(".").strip()


def as_integer(answer: str) -> int | None:
    """The integer an answer states, exactly, or None.

    "025", "27.0", "1,234", "$-3$" and "\\boxed{7}" are integers; "2^3" is left to sympy.
    """
    digits = _integer_digits(answer)
    return None if digits is None or len(digits) > _MAX_DIGITS else int(digits)


def _integer_digits(answer: str) -> str | None:
    """The digits of the integer that an answer states, without leading zeros, with a minus sign if it has one. Linear in any length."""
    text = strip_decoration(answer).replace("\u2212", "-").replace("{,}", ",").replace("\\,", "").replace("\\!", "").strip()
    match = _PLAIN_INTEGER.fullmatch(text) or _GROUPED_INTEGER.fullmatch(text)
    if match is None:
        return None
    digits = match[2].replace(",", "").lstrip("0") or "0"
    return digits if match[1] != "-" or digits == "0" else f"-{digits}"


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
    """Whether an answer equals its label by text and digits alone. Linear in the length of both.

    Integers and numerals with a base ("52_8") are decided both ways. Other numbers are left open where rounding (up to 1e-6 of the label)
    or a percent sign on one side may explain the difference; different texts always are, as the worker may know more.

    Args:
        label: as the data set has it.
        answer: as the model wrote it, box or marker removed.
        tolerance: how far a number may lie from its label.

    Returns:
        The verdict; None when text and digits cannot decide.
    """
    here, there = _integer_digits(label), _integer_digits(answer)
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
    return True if spelling(label) == spelling(answer) else None


def for_math_verify(answer: str) -> str:
    """An answer in a spelling that math-verify reads: no decoration, powers of ten written out, one way to write primes and subscripts."""
    text = _SCIENTIFIC.sub(r"\1 \\times 10^{\2}", strip_decoration(answer))
    text = _PRIMES.sub(lambda match: "'" * match[0].count("\\prime"), text)
    return _SHORT_SUBSCRIPT.sub(r"_\1", text)


def spelling(answer: str) -> str:
    """An answer without what has no meaning: white space, sizes of brackets and fractions, braces around one letter of a subscript."""
    text = strip_decoration(answer).replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    for mark in ("\\left", "\\right", "\\!", "\\,", "\\;", "\\ ", "~"):
        text = text.replace(mark, " ")
    return _FREE_SPACE.sub("", " ".join(_SHORT_SUBSCRIPT.sub(r"_\1", text).split()))
