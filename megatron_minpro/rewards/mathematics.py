"""Whether two LaTeX expressions are the same mathematics: math-verify, guarded where it rounds. Imports sympy: for the worker alone."""

from __future__ import annotations

from typing import Any

import sympy
from math_verify import LatexExtractionConfig, parse, verify

from megatron_minpro.rewards.answers import for_math_verify

# math-verify rounds to 6 decimals: numbers below the first value are compared to the second, as a part of the label, instead.
_SMALL_BELOW, _SMALL_RELATIVE = sympy.Float("1e-3", 60), sympy.Float("1e-4", 60)
# It compares through floats of 15 digits in places; integers at least this large are compared exactly instead.
_EXACT_FROM = 10**15
_DIGITS = 100  # of closed expressions without a decimal point: different ones agree in fewer than 90, equal ones in all but a few
_EQUAL_BELOW = sympy.Float("1e-90", 100)
_SAMPLE = sympy.Rational(17, 7)  # a positive value for the first variable of an expression; the next ones follow it


def same_mathematics(label: str, answer: str, *, relative: float, absolute: float) -> bool:
    """Whether an answer is the same mathematical object as the label, or a number within the tolerances.

    Args:
        label, answer: LaTeX without delimiters.
        relative: tolerance for numbers as a part of the label.
        absolute: tolerance for numbers.

    Returns:
        math-verify's verdict, corrected where it rounds: below 1e-3, beyond float64, and for coefficients that it takes for zero.

    Raises:
        ValueError: the label cannot be read.
    """
    # No time limit here: math-verify's own cannot interrupt C code; the parent's clock is the only one.
    # LaTeX alone: where that cannot be read, math-verify would otherwise take the last number in the text for the answer.
    reading = [LatexExtractionConfig()]
    expected = parse(_as_math(label), extraction_config=reading, parsing_timeout=None)
    found = parse(_as_math(answer), extraction_config=reading, parsing_timeout=None)
    if not expected:
        raise ValueError(f"label {label!r} is not readable mathematics")
    wanted, given = _as_number(expected), _as_number(found)
    if wanted is None or given is None:
        return verify(expected, found, timeout_seconds=None) and not _differ_somewhere(expected[0], found[0])
    distance = abs(wanted - given)
    if distance <= max(relative * abs(wanted), absolute):
        return True
    if not (expected[0].has(sympy.Float) or found[0].has(sympy.Float)):
        if distance <= _EQUAL_BELOW * abs(wanted):
            return True
        return _percentage_of(expected[0], found[0]) and verify(expected, found, timeout_seconds=None)
    if not verify(expected, found, timeout_seconds=None):
        return False
    if abs(wanted) < _SMALL_BELOW and abs(given) < _SMALL_BELOW:
        return bool(distance <= _SMALL_RELATIVE * abs(wanted))
    return not (isinstance(expected[0], sympy.Integer) and abs(int(expected[0])) >= _EXACT_FROM)


def _as_math(text: str) -> str:
    """One math expression: "$69$,$84$" and "69,84" become "$69,84$", "90\\%" keeps its sign."""
    return f"${for_math_verify(text).replace('$', '').strip()}$"


def _as_number(parsed: list[Any]) -> Any:
    """The value of what math-verify has read to 100 digits, when it is one finite number; sympy's floats have no limit of size."""
    if not parsed or not isinstance(parsed[0], sympy.Expr) or not parsed[0].is_number:
        return None
    value = parsed[0].doit().evalf(_DIGITS)  # percentages come as products that sympy was told not to work out
    return value if value.is_finite and all(part.is_Float or part.is_Integer for part in value.as_real_imag()) else None


def _percentage_of(label: Any, answer: Any) -> bool:
    """Whether one of two numbers has a percent sign, which data sets use and leave out."""
    return any(expression.has(sympy.UnevaluatedExpr) for expression in (label, answer))


def _differ_somewhere(label: Any, answer: Any) -> bool:
    """Whether two expressions in the same variables have clearly different values at a point: math-verify drops small coefficients."""
    if not all(
        isinstance(side, sympy.Expr) and side.free_symbols and not side.atoms(sympy.core.function.AppliedUndef) for side in (label, answer)
    ):
        return False
    if label.free_symbols != answer.free_symbols:
        return False
    point = {symbol: _SAMPLE + sympy.Rational(number, 3) for number, symbol in enumerate(sorted(label.free_symbols, key=str))}
    try:
        here, there = (side.subs(point).evalf(_DIGITS) for side in (label, answer))
    except (TypeError, ValueError, ArithmeticError):  # no value there: math-verify's verdict stands
        return False
    if not (here.is_number and there.is_number and here.is_finite and there.is_finite):
        return False
    return bool(abs(here - there) > sympy.Float("1e-5", _DIGITS) * abs(here))
