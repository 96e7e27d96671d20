"""Arithmetic in LaTeX is worked out exactly: against Fraction on generated expressions, and by hand."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_minpro.rewards.exact_number import read_number
from megatron_minpro.rewards.typography import as_latex

Term = tuple[str, Fraction]  # LaTeX, and its value by Fraction's own arithmetic


def numerals() -> st.SearchStrategy[Term]:
    """A number in one of the ways in which people write one."""
    whole = st.integers(0, 10**30)
    small = st.integers(1, 999)
    digits = st.text("0123456789", min_size=1, max_size=6)
    return st.one_of(
        whole.map(lambda n: (str(n), Fraction(n))),
        whole.map(lambda n: (f"{n:,}", Fraction(n))),
        st.integers(1000, 10**12).map(lambda n: (f"{n:,}".replace(",", "\u202f"), Fraction(n))),
        whole.map(lambda n: (str(n).translate(str.maketrans("0123456789", "０１２３４５６７８９")), Fraction(n))),
        st.tuples(small, digits).map(lambda pair: (f"{pair[0]}.{pair[1]}", Fraction(f"{pair[0]}.{pair[1]}"))),
        st.tuples(small, small).map(lambda pair: (f"\\frac{{{pair[0]}}}{{{pair[1]}}}", Fraction(*pair))),
        st.tuples(small, small).map(lambda pair: (f"({pair[0]}/{pair[1]})", Fraction(*pair))),
        st.tuples(small, st.integers(1, 99), st.integers(100, 999)).map(lambda t: (f"{t[0]} {t[1]}/{t[2]}", t[0] + Fraction(t[1], t[2]))),
        st.tuples(small, st.integers(1, 99), st.integers(100, 999)).map(
            lambda t: (f"{t[0]}\\tfrac{{{t[1]}}}{{{t[2]}}}", t[0] + Fraction(t[1], t[2]))
        ),
        st.tuples(small, digits).map(
            lambda pair: (f"{pair[0]}.\\overline{{{pair[1]}}}", pair[0] + Fraction(int(pair[1]), 10 ** len(pair[1]) - 1))
        ),
        st.tuples(st.integers(1, 99), st.integers(-60, 60)).map(lambda t: (f"{t[0]} x 10^{{{t[1]}}}", t[0] * Fraction(10) ** t[1])),
        st.tuples(st.integers(1, 99), st.integers(-60, 60)).map(lambda t: (f"{t[0]}e{t[1]}", t[0] * Fraction(10) ** t[1])),
        st.tuples(st.integers(2, 30), st.integers(0, 400)).map(lambda t: (f"{t[0]}^{{{t[1]}}}", Fraction(t[0] ** t[1]))),
        st.integers(0, 200).map(lambda n: (f"{n}!", Fraction(math.factorial(n)))),
        st.integers(0, 10**20).map(lambda n: (f"\\sqrt{{{n * n}}}", Fraction(n))),
        st.tuples(st.integers(0, 60), st.integers(0, 60)).map(
            lambda t: (f"\\binom{{{max(t)}}}{{{min(t)}}}", Fraction(math.comb(max(t), min(t))))
        ),
    )


def combined(inner: st.SearchStrategy[Term]) -> st.SearchStrategy[Term]:
    def join(parts: tuple[str, Term, Term]) -> Term:
        operator, (left, first), (right, second) = parts
        if operator == "frac":
            return (f"\\frac{{{left}}}{{{right}}}", first / second) if second else (f"({left})", first)
        value = {"+": first + second, " - ": first - second, "\\cdot ": first * second, "\\times": first * second}[operator]
        return f"({left}){operator}({right})", value

    return st.tuples(st.sampled_from(["+", " - ", "\\cdot ", "\\times", "frac"]), inner, inner).map(join)


@settings(deadline=None)
@given(st.recursive(numerals(), combined, max_leaves=5))
def test_arithmetic_has_the_value_that_fractions_give(term: Term) -> None:
    text, value = term
    read = read_number(as_latex(text))
    assert read is not None
    assert (read.value, read.rest) == (value, "")


@settings(deadline=None)
@given(numerals(), st.sampled_from([" apples", ", since it fits", "\\pi", " y", " = 7", "\\text{ cm}"]))
def test_the_reader_stops_where_the_arithmetic_ends(term: Term, tail: str) -> None:
    read = read_number(as_latex(term[0] + tail))
    assert read is not None
    assert (read.value, read.rest) == (term[1], as_latex(f"{{0}}{tail}").removeprefix("{0}").strip())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("-2^2", Fraction(-4)),
        ("2^{-3}", Fraction(1, 8)),
        ("8^{2/3}", Fraction(4)),
        ("7!!", Fraction(105)),
        ("0.1666\\ldots", Fraction(1, 6)),
        ("0.\\dot{1}4285\\dot{7}", Fraction(1, 7)),
        ("0.(3)", Fraction(1, 3)),
        ("2½", Fraction(5, 2)),
        ("-1 1/2", Fraction(-3, 2)),
        ("1/2/2", Fraction(1, 4)),
        ("2(3+4)", Fraction(14)),
        ("2 3/2", None),  # neither a product nor a mixed number
        ("3.14159\\ldots", None),
        ("\\sqrt{2}", None),
        ("\\frac{1}{0}", None),
        ("x", None),
        ("(" * 5000, None),
        ("9" * 100_000, None),
    ],
)
def test_readings_worked_by_hand(text: str, expected: Fraction | None) -> None:
    read = read_number(as_latex(text))
    assert (None if read is None else read.value) == expected


@pytest.mark.parametrize("text", ["9^{9^{9}}", "10^{10^{10}}", "(9^{99999})^{99999}", "20001!", "1e9999999"])
def test_values_that_would_fill_the_memory_are_left_alone(text: str) -> None:
    read = read_number(text)
    assert read is None or read.rest != ""
