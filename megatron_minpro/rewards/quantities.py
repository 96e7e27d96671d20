"""A number with what stands around it: a unit, a percent sign, a currency, a remark."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction

from megatron_minpro.rewards.exact_number import read_number
from megatron_minpro.rewards.units import Unit, read_unit

_TEXT = re.compile(r"\\(?:text|textrm|textbf|textit|textsf|textnormal|mbox|hbox|mathrm|mathit|operatorname|rm|unit|si)\s*\{([^{}]*)\}")
_CURRENCY = re.compile(r"\s*(-?)\s*(\\\$|\\euro|\\pound(?:s)?|\\yen|(?:US|A|C)\\?\$)\s*")
_CURRENCY_NAMES = {"\\$": "dollar", "\\euro": "euro", "\\pound": "gbp", "\\pounds": "gbp", "\\yen": "yen"}
_DEGREE = re.compile(r"(?:\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))|\\circ(?![A-Za-z]))\s*")
_SCALE = re.compile(r"(hundred|thousand|million|billion|trillion|dozen)s?(?![A-Za-z])\s*", re.IGNORECASE)
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_PERCENT = re.compile(r"(?:\\?%|percent(?:age)?(?: points?)?(?![A-Za-z])|per cent(?![A-Za-z])|pct\.?(?![A-Za-z]))\s*", re.IGNORECASE)
_MONEY_SIGN = re.compile(r"(\\\$|\\euro|\\pounds?|\\yen|\\cent)(?![A-Za-z])\s*")
_BRACKETED = re.compile(r"^\(([^()]*)\)|^\[([^\[\]]*)\]")
_CONGRUENCE = re.compile(r"^\(?\s*\\?p?b?mod(?:ulo)?\b.{0,40}$")

# Words that begin an explanation: whatever follows them is about the answer, not part of it.
_EXPLAINS = (
    r"since|because|as|so|for|given|using|where|which|when|after|from|i\.e\.?|that is|obtained|rather than|instead of|not|thus|hence"
    r"|therefore|by|due to|is the|are the|was|were|based on|according|corresponding|this|meaning|namely|assuming|considering"
)
EXPLANATION = re.compile(
    rf"\s*(?:[,;:.(\[—-]|\\(?:q?quad|Rightarrow|because)(?![A-Za-z])|\s)\s*(?:\\(?:text|mbox|textrm)\s*\{{\s*)?[,;(]?\s*(?:{_EXPLAINS})(?![A-Za-z])",
    re.IGNORECASE,
)
# Words that change what a number means. A number followed by one of them is another answer, or none.
_CHANGES = frozenset(
    (
        "or", "and", "plus", "minus", "times", "over", "to", "if", "unless", "otherwise", "but", "than", "wait", "no", "mod", "modulo",
        "base", "factorial", "squared", "cubed", "half", "halves", "quarter", "third", "thirds", "quarters", "fifths", "divided",
        "multiplied", "power", "raised", "between", "through", "until", "except", "more", "less", "maybe", "perhaps", "possibly",
        "either", "actually", "sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "sqrt", "gcd", "lcm", "deg",
        "arcsin", "arccos", "arctan", "pi", "theta", "alpha", "beta", "choose", "hundredths", "tenths",
        "thousandths", "eighths", "remainder", "with", "ratio", "wrong", "incorrect", "false", "impossible",
    )
)  # fmt: skip
_SHORT_WORDS = frozenset(("of", "in", "on", "at", "sq", "cu", "is", "we"))
_PLAIN_WORDS = re.compile(r"[^\W\d_](?:[^\W\d_]|[ ,.;:'\"()/-])*")
_WORD = re.compile(r"[^\W\d_]+")
_ARROW = re.compile(r"^(?:\\(?:to|implies|Rightarrow|quad|qquad)(?![A-Za-z])|--+)\s*")
_END_SIGNS = re.compile(r"^(?:[.,;:]|\\(?:square|Box|qed|blacksquare|checkmark)(?![A-Za-z])|[\"'])*$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantity:
    """What an answer states: a number, perhaps of something."""

    value: Fraction
    rounded: bool  # written with a decimal point
    unit: Unit | None  # None: none, or a word that is no unit ("34 apples")
    percent: bool


def read_quantity(text: str) -> Quantity | None:
    """The quantity that a whole text states.

    Args:
        text: LaTeX as typography.as_latex writes it, without an equation's left side.

    Returns:
        The quantity; None when the text is anything else ("2\\pi", "34 or 35", "45_8", "2:30", "(1,2)").
    """
    money = None
    currency = _CURRENCY.match(text)
    if currency is not None:
        money = read_unit(_CURRENCY_NAMES.get(currency[2], "dollar"))
        text = currency[1] + text[currency.end() :]
    number = read_number(text)
    if number is None:
        return None
    rest = _TEXT.sub(r" \1 ", number.rest)
    in_text_or_apart = rest != number.rest or text[: len(text) - len(number.rest)].endswith((" ", "}", ")"))
    quantity = _behind(Quantity(value=number.value, rounded=number.rounded, unit=None, percent=False), rest.strip(), in_text_or_apart)
    if quantity is None or money is None:
        return quantity
    return replace(quantity, unit=money[0]) if quantity.unit is None and not quantity.percent else None


def without_explanation(text: str) -> str:
    """A text up to the first word that begins an explanation of it; the whole text when there is none, or when nothing stands before it."""
    found = EXPLANATION.search(text)
    return text if found is None or found.start() == 0 else text[: found.start()].rstrip(" ,;:.([-")


def split_unit(text: str) -> tuple[str, Unit | None]:
    """A text without the unit at its end, and that unit: "2\\pi\\text{ cm}^2" gives "2\\pi" and square centimetres.

    Bare letters count as variables unless they stand behind a space and are longer than one.
    """
    degree = re.search(r"\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ)\s*$", text)
    if degree is not None and degree.start() > 0:
        found = read_unit("degrees")
        assert found is not None
        return text[: degree.start()], found[0]
    place = text.rfind("\\text{")
    place = place if place > 0 else text.rfind("\\mathrm{")
    if place > 0:
        found = read_unit(_TEXT.sub(r" \1 ", text[place:]).strip())
        if found is not None and not found[1].strip(" .{}"):
            return text[:place].rstrip(" ~"), found[0]
        return text, None
    words = re.search(r"(?<=[0-9})]) ((?:(?:sq|square|cubic|cu)\.? )?[A-Za-z]{2,}(?:\^\{?[1-9]\}?)?(?:/[A-Za-z]+)?\.?)$", text)
    if words is not None and (found := read_unit(words[1])) is not None and not found[1].strip(" ."):
        return text[: words.start()], found[0]
    return text, None


def _behind(quantity: Quantity, rest: str, apart: bool) -> Quantity | None:
    """The quantity with what stands behind its number. apart: the words do not touch the number, so they are no product of variables."""
    scale = _SCALE.match(rest)
    if scale is not None:
        quantity, rest = replace(quantity, value=quantity.value * _SCALES[scale[1].lower()]), rest[scale.end() :]
        rest = rest.removeprefix("of ")
    percent = _PERCENT.match(rest)
    if percent is not None:
        quantity, rest = replace(quantity, percent=True), rest[percent.end() :]
        return quantity if _says_nothing(rest) else None
    degree = _DEGREE.match(rest)
    if degree is not None:
        rest = rest[degree.end() :]
        scale_name = re.match(r"(C|F|K|celsius|fahrenheit)(?![A-Za-z])", rest, re.IGNORECASE)
        name = "degrees" if scale_name is None else {"c": "celsius", "f": "fahrenheit", "k": "kelvin"}[scale_name[1][0].lower()]
        return _with_unit(quantity, name + " " + rest[0 if scale_name is None else scale_name.end() :])
    sign = _MONEY_SIGN.match(rest)
    if sign is not None:
        name = "cent" if sign[1] == "\\cent" else _CURRENCY_NAMES[sign[1]]
        return _with_unit(quantity, f"{name} {rest[sign.end() :]}")
    temperature = re.match(r"degrees? (celsius|fahrenheit|C|F)(?![A-Za-z])", rest, re.IGNORECASE)
    if temperature is not None:
        return _with_unit(quantity, {"c": "celsius", "f": "fahrenheit"}[temperature[1][0].lower()] + rest[temperature.end() :])
    bracketed = _BRACKETED.match(rest)
    if bracketed is not None and _says_nothing(rest[bracketed.end() :]):
        inside = (bracketed[1] or bracketed[2] or "").strip()
        return (
            quantity
            if not inside or EXPLANATION.match(f" {inside}")
            else _behind(quantity, inside, True)
            if inside[0].isalpha() or inside[0] in "\\%^"
            else None
        )
    if rest[:1].isalpha():
        first = _WORD.match(rest)
        assert first is not None
        touching = not apart and first[0].isascii()
        if len(first[0]) == 1 and touching:
            return None
        if (found := read_unit(rest)) is not None and not (touching and len(first[0]) < 2):
            return replace(quantity, unit=found[0]) if _says_nothing(found[1]) else None
        if touching or (
            len(first[0]) < 3 and first[0].isascii() and first[0].lower() not in _SHORT_WORDS and not EXPLANATION.match(f" {rest}")
        ):
            return None
    if _CONGRUENCE.match(rest):
        return quantity
    return quantity if _says_nothing(rest) else None


def _with_unit(quantity: Quantity, text: str) -> Quantity | None:
    found = read_unit(text)
    return replace(quantity, unit=found[0]) if found is not None and _says_nothing(found[1]) else None


def _says_nothing(rest: str) -> bool:
    """Whether a text behind a complete answer leaves it as it is: punctuation, an explanation, or words that are no arithmetic."""
    rest = _ARROW.sub("", rest.strip())
    if _END_SIGNS.match(rest) or EXPLANATION.match(f" {rest}"):
        return True
    words = rest.lstrip(",;:. (-—")
    bracket = rest != words and rest.lstrip(",;:. ")[:1] == "("
    if bracket and words.endswith(")"):
        words = words[:-1]
    if not words or (rest[:1] == "-" and not rest[1:2].isspace()):
        return False
    if not _PLAIN_WORDS.fullmatch(words):
        return False
    return not any(word.lower() in _CHANGES for word in _WORD.findall(words))


def quantities_equal(wanted: Quantity, found: Quantity, *, relative: Fraction, absolute: Fraction) -> bool:
    """Whether two quantities are the same.

    Args:
        wanted, found: the label's and the answer's.
        relative, absolute: how far the found number may lie from the wanted one; relative is a part of the wanted one.

    Returns:
        True when the numbers agree and no unit contradicts. A missing unit contradicts none; 5 cm is 0.05 m, never 5 m. A percent sign on
        one side alone may mean a hundredth or nothing, since data sets use both. Numbers with a decimal point may be rounded to 6 decimals.
    """
    if wanted.unit is not None and found.unit is not None:
        if wanted.unit.dimensions != found.unit.dimensions:
            return False
        ratio = found.unit.factor / wanted.unit.factor
        return numbers_equal(wanted.value, found.value * ratio, wanted.rounded or found.rounded, relative=relative, absolute=absolute)
    if (wanted.percent and found.unit is not None) or (found.percent and wanted.unit is not None):
        return False
    rounded = wanted.rounded or found.rounded
    readings = [(wanted.value, found.value)]
    if wanted.percent != found.percent:
        readings.append((wanted.value / 100, found.value) if wanted.percent else (wanted.value, found.value / 100))
    return any(numbers_equal(here, there, rounded, relative=relative, absolute=absolute) for here, there in readings)


# math-verify compares decimals to 6 places. Below the first value different numbers would be equal: there a part of the label counts.
_SMALL_BELOW, _SMALL_RELATIVE = Fraction(1, 1000), Fraction(1, 10_000)
_EXACT_FROM = 10**15  # a label this large is an exact integer, not a rounded value


def numbers_equal(wanted: Fraction, found: Fraction, rounded: bool, *, relative: Fraction, absolute: Fraction) -> bool:
    """Whether two numbers are equal, within a tolerance, or up to rounding where one of them has a decimal point.

    Args:
        wanted, found: the label's and the answer's.
        rounded: one of them was written with a decimal point.
        relative, absolute: the tolerance; relative is a part of the wanted number.

    Returns:
        The verdict, computed without floats.
    """
    distance = abs(wanted - found)
    if distance <= max(relative * abs(wanted), absolute):
        return True
    if not rounded:
        return False
    if abs(wanted) < _SMALL_BELOW and abs(found) < _SMALL_BELOW:
        return distance <= _SMALL_RELATIVE * abs(wanted)
    if wanted.denominator == 1 and abs(wanted) >= _EXACT_FROM:
        return False
    return round(wanted, 6) == round(found, 6)
