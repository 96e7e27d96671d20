"""Whether an answer states what a label states: rules for what text and exact arithmetic can decide; the rest is left to math-verify.

Runs in the grading worker, under its time limit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from megatron_minpro.rewards.answers import last_boxed, spelling
from megatron_minpro.rewards.quantities import Quantity, quantities_equal, read_quantity, split_unit, without_explanation
from megatron_minpro.rewards.relations import (
    answer_of_equation,
    approximated,
    as_interval,
    is_equation,
    is_name,
    list_elements,
    sides_to_check,
)
from megatron_minpro.rewards.typography import as_latex, without_outer_braces

SameMathematics = Callable[[str, str], bool]  # (label, answer), both LaTeX

# Words in front of an answer that only introduce it.
_INTRODUCTION = re.compile(
    r"^(?:\s|[=:,]|\\approx(?![A-Za-z])|\\(?:therefore|implies|Rightarrow|to|sim)(?![A-Za-z])|~|[\"']"
    r"|(?:the|final|answer|result|value|is|are|equals?|equal to|about|approximately|approx\.?|around|roughly|exactly|precisely|thus|so"
    r"|hence|therefore|it|we|get|have|that|simply|just|there)(?![A-Za-z(_^\\]))+",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"^[A-Za-z][A-Za-z ,']*?\b(?:is|are|equals|equal to)\s+(?=[-+0-9\\(\[$.])")
_NEGATION = re.compile(r"\b(?:not|no|none|neither|nor|never|cannot|isn't|aren't|than|least|most|if|unless|between)\b", re.IGNORECASE)
_END = re.compile(r"(?:(?<!\.)\.|[\s,;:\"'])+$")  # an ellipsis stays
_TEXT_INTRODUCTION = re.compile(
    r"^\\(?:text|mbox|textbf|textrm|mathrm)\s*\{\s*(?:the |final |answer |is |are |: |= )+\s*:?\s*\}\s*", re.IGNORECASE
)

_BASES = {
    "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10, "eleven": 11, "twelve": 12,
    "sixteen": 16, "bin": 2, "oct": 8, "dec": 10, "hex": 16,
}  # fmt: skip
_BASED = re.compile(
    r"\(?\s*([0-9][0-9A-Za-z]*|[A-Fa-f][0-9A-Fa-f]*[0-9][0-9A-Fa-f]*|[A-Fa-f]{2,}(?=\)?_\{?16))\s*\)?\s*"
    r"(?:_\s*\{?\s*(?:\\(?:text|mathrm)\s*\{\s*)?\(?([0-9]{1,2}|[a-z]+)\)?\s*\}?\s*\}?"
    r"|\(?(?:\\text\s*\{)?\s*\(?(?:in )?base[ -]*([0-9]{1,2}|[a-z]+)\s*\)?\}?\)?)"
)
_PREFIXED = re.compile(r"0([xXbBoO])([0-9A-Fa-f]+)")
_TIME = re.compile(
    r"([01]?[0-9]|2[0-4])\s*:\s*([0-5][0-9])(?:\s*:\s*([0-5][0-9]))?\s*(?:\\(?:text|mathrm)\s*\{)?\s*([ap])?\.?\s*(?:m\.?)?\s*\}?",
    re.IGNORECASE,
)


_BRACKETS = (
    ("set", "\\{", "\\}"),
    ("ordered", "(", ")"),
    ("ordered", "[", "]"),
    ("ordered", "(", "]"),
    ("ordered", "[", ")"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerances:
    """How far a number may lie from its label, exactly."""

    relative: Fraction
    absolute: Fraction


def same_answer(label: str, answer: str, *, relative: float, absolute: float, same_mathematics: SameMathematics) -> bool:
    """Whether an answer states what its label states.

    Args:
        label: as the data set has it.
        answer: as the model wrote it, box or marker removed.
        relative: tolerance for numbers as a part of the label.
        absolute: tolerance for numbers.
        same_mathematics: decides what the rules here leave open; it gets both sides in LaTeX.

    Returns:
        The verdict. An answer that is no value of the label's kind (another unit, another base, a false equation, a set for a point)
        is never asked about.
    """
    allowed = Tolerances(relative=Fraction(str(relative)), absolute=Fraction(str(absolute)))
    wanted, found = _tidied(label), _tidied(answer)
    if not wanted:
        return same_mathematics(label, answer)
    both = _quantities(wanted, found, allowed)
    if both is not None:
        return both
    contradiction = _based(wanted, found)
    if contradiction is not None:
        return contradiction
    if _contradicts_in_kind(wanted, found):
        return False
    sided = _sides(wanted, found, same_mathematics)
    if sided is None:
        return False
    wanted, found = sided
    both = _quantities(wanted, found, allowed)
    if both is not None:
        return both
    wanted, found = _intervals(wanted, found)
    listed = _lists(wanted, found, allowed)
    if listed is not None:
        return listed
    (wanted_head, wanted_unit), (found_head, found_unit) = split_unit(wanted), split_unit(found)
    if wanted_unit is not None and found_unit is not None and wanted_unit != found_unit:
        return False
    if found_unit is not None or (wanted_unit is not None and read_quantity(found) is not None):
        wanted, found = wanted_head, found_head
    readings = approximated(found)
    if any(same_mathematics(wanted, reading) for reading in readings):
        return True
    return label.strip() != answer.strip() and spelling(wanted) == spelling(found)  # typography alone differed


def _tidied(text: str) -> str:
    """An answer without typography, without words in front of it, and without an explanation behind it."""
    boxed = last_boxed(text)
    text = as_latex(text if boxed is None else boxed).replace("\\langle", "(").replace("\\rangle", ")")
    bare = _TEXT_INTRODUCTION.sub("", text)
    bare = _INTRODUCTION.sub("", bare)
    sentence = _SENTENCE.match(bare)
    if sentence is not None and not _NEGATION.search(sentence[0]):
        bare = bare[sentence.end() :]
    bare = _INTRODUCTION.sub("", bare)
    bare = without_outer_braces(_END.sub("", without_explanation(bare)))
    return bare if bare else text


def _quantities(wanted: str, found: str, allowed: Tolerances) -> bool | None:
    """The verdict where both sides are numbers with or without a unit."""
    here = read_quantity(wanted)
    there = None if here is None else _read_one(found)
    if here is None or there is None:
        return None
    return quantities_equal(here, there, relative=allowed.relative, absolute=allowed.absolute)


def _read_one(text: str) -> Quantity | None:
    quantity = read_quantity(text)
    if (quantity is None and text[:1] in "([" and text[-1:] in ")]") or (text.startswith("\\{") and text.endswith("\\}")):
        inside = text[2:-2] if text.startswith("\\{") else text[1:-1]
        return read_quantity(inside.strip())
    return quantity


def _based(wanted: str, found: str) -> bool | None:
    """The verdict where one side alone names a base. Digits that need none are read in base ten, except against a label with a base."""
    label_base, answer_base = _numeral_with_base(wanted), _numeral_with_base(found)
    if (label_base is None) == (answer_base is None):
        if label_base is None or answer_base is None:
            return None
        return (label_base[0].lstrip("0"), label_base[1]) == (answer_base[0].lstrip("0"), answer_base[1]) or None
    if answer_base is not None:
        other = read_quantity(wanted)
        return None if other is None else other.value == _value_in_base(*answer_base)
    assert label_base is not None
    return label_base[0].lstrip("0") == found.replace(" ", "").upper().lstrip("0") if re.fullmatch(r"[0-9A-Za-z ]+", found) else None


def _numeral_with_base(text: str) -> tuple[str, int] | None:
    prefixed = _PREFIXED.fullmatch(text)
    if prefixed is not None:
        return prefixed[2].upper(), {"x": 16, "b": 2, "o": 8}[prefixed[1].lower()]
    match = _BASED.fullmatch(text)
    if match is None:
        return None
    name = match[2] or match[3]
    base = int(name) if name.isdecimal() else _BASES.get(name, 0)
    return (match[1].upper(), base) if 2 <= base <= 36 else None


def _value_in_base(digits: str, base: int) -> int | None:
    try:
        return int(digits, base)
    except ValueError:
        return None


def _contradicts_in_kind(wanted: str, found: str) -> bool:
    """A time is no fraction and no other time; a set in braces is no point, interval or vector."""
    times = [_TIME.fullmatch(text) for text in (wanted, found)]
    if times[0] is not None and (times[0][4] or len(times[0][2]) == 2):
        if times[1] is None:
            return _is_ratio(found)
        (hour, minute, second, half), (other_hour, other_minute, other_second, other_half) = times[0].groups(), times[1].groups()
        same = (int(hour), minute, second or "00") == (int(other_hour), other_minute, other_second or "00")
        return not same or (half is not None and other_half is not None and half.lower() != other_half.lower())
    if times[1] is not None and _is_ratio(wanted):
        return ":" not in wanted
    kinds = {_bracket_kind(text) for text in (wanted, found)}
    return kinds == {"set", "ordered"}


def _is_ratio(text: str) -> bool:
    return "/" in text or "\\frac" in text or ":" in text or read_quantity(text) is not None


def _bracket_kind(text: str) -> str:
    """set: braces around a list. ordered: round, square or angle brackets around one. "": anything else."""
    for kind, opening, closing in _BRACKETS:
        if text.startswith(opening) and text.endswith(closing):
            inside = text[len(opening) : len(text) - len(closing)]
            return kind if len(list_elements(inside)) > 1 and len(list_elements(text)) == 1 else ""
    return ""


def _sides(wanted: str, found: str, same_mathematics: SameMathematics) -> tuple[str, str] | None:
    """Label and answer without the name that an equation gives them; None when the answer's equation is no answer to the label."""
    if is_equation(wanted):
        if len(list_elements(wanted)) > 1:
            return wanted, found
        name, _, value = wanted.partition("=")
        other_name, _, other_value = found.partition("=")
        if is_equation(found):
            same_name = is_name(name) and name.replace(" ", "") == other_name.replace(" ", "") and not is_equation(other_value)
            return (value.strip(), other_value.strip()) if same_name and not is_equation(value) else (wanted, found)
        return (value.strip(), found) if is_name(name) and not is_equation(value) else (wanted, found)
    if not is_equation(found):
        return wanted, found
    elements = list_elements(found)
    answers = []
    for element in elements:
        answer = answer_of_equation(element)
        if answer is None or any(not same_mathematics(here, there) for here, there in sides_to_check(element)):
            return None
        answers.append(answer)
    return wanted, ", ".join(answers) if len(answers) > 1 else answers[0] if answers else found


def _intervals(wanted: str, found: str) -> tuple[str, str]:
    """Both sides, inequalities written as intervals; two inequalities only where they are in the same variable."""
    here, there = as_interval(wanted), as_interval(found)
    if here is not None and there is not None and here[0] != there[0]:
        return wanted, found
    return wanted if here is None else here[1], found if there is None else there[1]


def _lists(wanted: str, found: str, allowed: Tolerances) -> bool | None:
    """The verdict where both sides are lists of numbers, in the same brackets or in none; None leaves it open."""
    (opening, inside, closing), (other_opening, other_inside, other_closing) = _unbracketed(wanted), _unbracketed(found)
    if (opening, closing) != (other_opening, other_closing):
        return None
    labels, answers = list_elements(inside), list_elements(other_inside)
    if len(labels) < 2 or len(labels) != len(answers):
        return None
    here, there = [read_quantity(part) for part in labels], [read_quantity(part) for part in answers]
    numbers = [quantity for quantity in (*here, *there) if quantity is not None]
    if len(numbers) != 2 * len(labels):
        return None
    wanted_numbers, found_numbers = numbers[: len(labels)], numbers[len(labels) :]
    return _matched(wanted_numbers, found_numbers, allowed, ordered=opening in ("(", "["))


def _matched(wanted: Sequence[Quantity], found: Sequence[Quantity], allowed: Tolerances, *, ordered: bool) -> bool:
    left = list(found)
    for quantity in wanted:
        candidates = left[:1] if ordered else left
        same = next(
            (other for other in candidates if quantities_equal(quantity, other, relative=allowed.relative, absolute=allowed.absolute)), None
        )
        if same is None:
            return False
        left.remove(same)
    return True


def _unbracketed(text: str) -> tuple[str, str, str]:
    for opening, closings in (("\\{", ("\\}",)), ("(", (")", "]")), ("[", (")", "]"))):
        for closing in closings:
            if text.startswith(opening) and text.endswith(closing) and len(list_elements(text)) == 1:
                inside = text[len(opening) : len(text) - len(closing)]
                return ("", inside, "") if opening == "\\{" else (opening, inside, closing)
    return "", text, ""
