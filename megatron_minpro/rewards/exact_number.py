"""The exact value of an arithmetic expression: "2\\cdot 2^{2004}", "2005!", "1 1/2", "0.\\overline{3}". Fractions alone, no floats.

The reader stops where the arithmetic ends, so that a unit or a remark behind the number can be judged by others.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

_MAX_BITS = 1 << 20  # of a numerator or denominator: 315,000 digits, computed in well under a second
_MAX_DIGITS = 4000  # of one numeral; Python reads a numeral in quadratic time
_MAX_FACTORIAL = 20_000
_MAX_DEPTH = 40

_GROUPED = r"[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]{1,3}(?: [0-9]{3})+(?![0-9]|\s*/)"
_NUMERAL = re.compile(rf"(?P<whole>{_GROUPED}|[0-9]+)?(?P<point>\.(?![0-9]*\.[0-9])(?P<decimals>[0-9]*))?")
_REPEATED = re.compile(
    r"\\(?:overline|bar|overbar)\s*\{\s*([0-9]+)\s*\}|\\(?:overline|bar)\s*([0-9])|\(([0-9]+)\)"
    r"|\\dot\s*\{?([0-9])\}?(?:([0-9]*)\\dot\s*\{?([0-9])\}?)?"
)
_ELLIPSIS = re.compile(r"\s*(?:\.\.\.+|\\[lc]?dots(?![A-Za-z]))")
_EXPONENT = re.compile(r"[eE]([+-]?[0-9]{1,6})(?![0-9A-Za-z.^{])")
_MIXED = re.compile(
    r"\s*(?:and\s*|\\text\s*\{\s*and\s*\}\s*)?(?:\\frac\s*(?:\{\s*([0-9]+)\s*\}|([0-9]))\s*(?:\{\s*([0-9]+)\s*\}|([0-9]))|(?<=\s)([0-9]+)\s*/\s*([0-9]+)(?![0-9.!^]))"
)
_TIMES = re.compile(r"\s*(?:\\times(?![A-Za-z])|\\cdot(?![A-Za-z])|\*(?!\*)|[xX]\s*(?=10\s*\^)|(?<=\s)[xX](?=\s+[0-9]))\s*")
_OVER = re.compile(r"\s*(?:/|\\div(?![A-Za-z])|\\over(?![A-Za-z]))\s*")
_PLUS = re.compile(r"\s*([+-])\s*")
_SPACE = re.compile(r"\s*")
_BINOMIAL = re.compile(r"\\[dt]?binom\s*")
_FRACTION = re.compile(r"\\frac\s*")
_SQUARE_ROOT = re.compile(r"\\sqrt\s*(?:\[\s*([0-9]{1,3})\s*\])?\s*")
_FUNCTION_LIKE = re.compile(r"\s*\(")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactNumber:
    """A value and what stood behind it."""

    value: Fraction
    rounded: bool  # written with a decimal point, so its last digit may be rounded
    rest: str  # the text behind the arithmetic, white space removed


class _NoNumber(Exception):
    """The text at this place is no arithmetic, or too large to be worked out."""


def read_number(text: str) -> ExactNumber | None:
    """The longest arithmetic expression at the start of a text.

    Args:
        text: LaTeX as typography.as_latex writes it.

    Returns:
        Its exact value and the rest of the text; None when the text starts with no such expression, or when the value has more than
        a million bits.
    """
    reader = _Reader(text)
    try:
        value = reader.sum(0)
    except (_NoNumber, ZeroDivisionError, RecursionError):
        return None
    return ExactNumber(value=value, rounded=reader.rounded, rest=text[reader.at :].strip())


class _Reader:
    """Recursive descent over one text. `at` is where it stands."""

    def __init__(self, text: str) -> None:
        self.text, self.at, self.rounded = text, 0, False

    def sum(self, depth: int) -> Fraction:
        if depth > _MAX_DEPTH:
            raise _NoNumber
        value = self._product(depth)
        while (operator := _PLUS.match(self.text, self.at)) is not None:
            term = self._attempt(operator.end(), lambda: self._product(depth, signed=False))
            if term is None:
                break
            value = _small(value + term if operator[1] == "+" else value - term)
        return value

    def _attempt(self, start: int, read: Callable[[], Fraction]) -> Fraction | None:
        """What `read` reads from `start` on; None, and nothing moved, when that is no number."""
        before = self.at, self.rounded
        self.at = start
        try:
            return read()
        except (_NoNumber, ZeroDivisionError):
            self.at, self.rounded = before
            return None

    def _product(self, depth: int, *, signed: bool = True) -> Fraction:
        sign = 1
        self._skip_space()
        while signed and self.text[self.at : self.at + 1] in ("+", "-"):
            sign = -sign if self.text[self.at] == "-" else sign
            self.at += 1
            self._skip_space()
        value, divided = self._power(depth), False
        while True:
            if (times := _TIMES.match(self.text, self.at)) is not None:
                factor = self._attempt(times.end(), lambda: self._signed_power(depth))
            elif (over := _OVER.match(self.text, self.at)) is not None:
                factor = self._attempt(over.end(), lambda: 1 / self._signed_power(depth))
                divided = divided or factor is not None
            elif not divided and self.text.startswith(("(", "\\sqrt", "\\frac"), self._past_space()):
                factor = self._attempt(self._past_space(), lambda: self._power(depth))
            else:
                break
            if factor is None:
                break
            value = _small(value * factor)
        return sign * value

    def _signed_power(self, depth: int) -> Fraction:
        negative = self.text.startswith("-", self.at)
        self.at += negative
        value = self._power(depth)
        return -value if negative else value

    def _power(self, depth: int) -> Fraction:
        value = self._atom(depth)
        signs = len(self.text) - self.at - len(self.text[self.at :].lstrip("!"))
        if signs > 2:
            raise _NoNumber
        if signs:
            value = _factorial(value, step=signs)
            self.at += signs
        place = self._past_space()
        if self.text.startswith("^", place):
            exponent = self._attempt(place + 1, lambda: self._argument(depth, signed=True))
            if exponent is not None:
                return _raise(value, exponent)
        return value

    def _argument(self, depth: int, *, signed: bool = False) -> Fraction:
        """What follows a command: a braced expression, or one digit (of an exponent: a whole numeral)."""
        self._skip_space()
        if self.text.startswith("{", self.at):
            return self._enclosed("{", "}", depth)
        if signed:
            return self._signed_power(depth)
        digit = self.text[self.at : self.at + 1]
        if not (digit.isascii() and digit.isdecimal()):
            raise _NoNumber
        self.at += 1
        return Fraction(int(digit))

    def _enclosed(self, opening: str, closing: str, depth: int) -> Fraction:
        self.at += len(opening)
        value = self.sum(depth + 1)
        self._skip_space()
        if not self.text.startswith(closing, self.at):
            raise _NoNumber
        self.at += len(closing)
        return value

    def _atom(self, depth: int) -> Fraction:
        if depth > _MAX_DEPTH:
            raise _NoNumber
        self._skip_space()
        for opening, closing in (("(", ")"), ("{", "}")):
            if self.text.startswith(opening, self.at):
                return self._enclosed(opening, closing, depth)
        if (command := _FRACTION.match(self.text, self.at)) is not None:
            self.at = command.end()
            numerator = self._argument(depth + 1)
            return _small(numerator / self._argument(depth + 1))
        if (command := _SQUARE_ROOT.match(self.text, self.at)) is not None:
            self.at = command.end()
            return _root(self._argument(depth + 1), int(command[1] or 2))
        if (command := _BINOMIAL.match(self.text, self.at)) is not None:
            self.at = command.end()
            total = self._argument(depth + 1)
            return _binomial(total, self._argument(depth + 1))
        return self._numeral()

    def _numeral(self) -> Fraction:
        numeral = _NUMERAL.match(self.text, self.at)
        assert numeral is not None
        whole, decimals = numeral["whole"], numeral["decimals"] or ""
        point_only = whole is None and not decimals
        if numeral.end() - self.at > _MAX_DIGITS:
            raise _NoNumber
        digits = (whole or "0").replace(",", "").replace(" ", "")
        if numeral["point"] is not None:
            if (repeated := self._repeated(numeral.end(), decimals)) is not None:
                return int(digits) + repeated
            if point_only:
                raise _NoNumber
            if not decimals:  # "5." ends a sentence
                self.at = numeral.end() - 1
                return Fraction(int(digits))
            self.at, self.rounded = numeral.end(), True
            return self._scaled(Fraction(f"{digits}.{decimals}"))
        if whole is None:
            raise _NoNumber
        self.at = numeral.end()
        value = Fraction(int(digits))
        mixed = _MIXED.match(self.text, self.at)
        if mixed is not None:
            above, below = int(mixed[1] or mixed[2] or mixed[5]), int(mixed[3] or mixed[4] or mixed[6])
            if not 0 < above < below:
                raise _NoNumber
            self.at = mixed.end()
            return value + Fraction(above, below)
        return self._scaled(value)

    def _scaled(self, value: Fraction) -> Fraction:
        exponent = _EXPONENT.match(self.text, self.at)
        if exponent is None:
            return value
        self.at = exponent.end()
        return _small(value * _raise(Fraction(10), Fraction(int(exponent[1]))))

    def _repeated(self, start: int, decimals: str) -> Fraction | None:
        """The part behind the point of a repeating decimal whose plain decimals have been read; None when it does not repeat."""
        mark = _REPEATED.match(self.text, start)
        if mark is not None:
            period = mark[1] or mark[2] or mark[3] or mark[4] + (mark[5] or "") + (mark[6] or "")
            ellipsis = _ELLIPSIS.match(self.text, mark.end())
            self.at = mark.end() if ellipsis is None else ellipsis.end()
            return _repeating(decimals, period)
        ellipsis = _ELLIPSIS.match(self.text, start)
        if ellipsis is None or len(decimals) > 200:
            return None
        for length in range(1, len(decimals) // 2 + 1):
            period = decimals[-length:]
            times = 1
            while decimals.endswith(period * (times + 1)):
                times += 1
            covered = times * length
            if times >= 2 and (covered == len(decimals) or (times >= 3 if length == 1 else covered >= 6)):
                self.at = ellipsis.end()
                return _repeating(decimals[: len(decimals) - covered], period)
        raise _NoNumber  # "3.14159...": the exact number is unknown

    def _skip_space(self) -> None:
        self.at = self._past_space()

    def _past_space(self) -> int:
        space = _SPACE.match(self.text, self.at)
        assert space is not None
        return space.end()


def _small(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > _MAX_BITS:
        raise _NoNumber
    return value


def _repeating(decimals: str, period: str) -> Fraction:
    scale = 10 ** len(decimals)
    return Fraction(int(decimals or "0"), scale) + Fraction(int(period), scale * (10 ** len(period) - 1))


def _factorial(value: Fraction, *, step: int) -> Fraction:
    """n!, or the double factorial n!! with step 2."""
    if value.denominator != 1 or not 0 <= value.numerator <= _MAX_FACTORIAL:
        raise _NoNumber
    return Fraction(math.factorial(value.numerator) if step == 1 else math.prod(range(value.numerator, 0, -step)))


def _binomial(total: Fraction, chosen: Fraction) -> Fraction:
    if total.denominator != 1 or chosen.denominator != 1 or not 0 <= chosen <= total <= _MAX_FACTORIAL:
        raise _NoNumber
    return Fraction(math.comb(total.numerator, chosen.numerator))


def _raise(base: Fraction, exponent: Fraction) -> Fraction:
    """base ** exponent, where that is a fraction of bearable size."""
    if exponent.denominator != 1:
        if exponent.denominator > 100:
            raise _NoNumber
        base, exponent = _root(base, exponent.denominator), Fraction(exponent.numerator)
    power = exponent.numerator
    if base == 0 and power <= 0:
        raise _NoNumber
    if base in (0, 1, -1):
        return base if power % 2 or base >= 0 else -base
    if abs(power) * max(base.numerator.bit_length(), base.denominator.bit_length()) > _MAX_BITS:
        raise _NoNumber
    return base**power


def _root(value: Fraction, degree: int) -> Fraction:
    """The real root, where it is a fraction."""
    if degree < 1 or value < 0:
        raise _NoNumber
    above, below = (_whole_root(part, degree) for part in (value.numerator, value.denominator))
    return Fraction(above, below)


def _whole_root(value: int, degree: int) -> int:
    if degree == 2:
        root = math.isqrt(value)
    else:
        low, high = 0, 1 << (value.bit_length() // degree + 1)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if middle**degree <= value else (low, middle - 1)
        root = low
    if root**degree != value:
        raise _NoNumber
    return root
