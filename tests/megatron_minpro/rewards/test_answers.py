"""Reading and comparing answers by text and digits alone."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_minpro.rewards.answers import Tolerance, as_number, compare_plainly, extract_answer, for_math_verify, last_boxed


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("27.0", Fraction(27)),
        (".0000672", Fraction(672, 10**7)),
        ("4.5e33", Fraction(45) * 10**32),
        ("4.5 \\times 10^{33}", Fraction(45) * 10**32),
        ("$10^{-5}$", Fraction(1, 10**5)),
        ("10^2", Fraction(100)),
        ("1e-5", Fraction(1, 10**5)),
        ("-3.5E+2", Fraction(-350)),
        ("\u22121.5", Fraction(-3, 2)),
        ("\\$32,\\!348", Fraction(32348)),
        ("1,234.50", Fraction(2469, 2)),
        ("12.5\\%", Fraction(25, 2)),
        ("62.5%", Fraction(125, 2)),
        ("1/2", None),
        ("10^{n}", None),
        ("3^2", None),
        ("2\\pi", None),
        ("5 \\text{ million}", None),
        ("1,23", None),
        ("1e999999999", None),  # would fill the memory
        ("", None),
    ],
)
def test_numbers_are_read_exactly(text: str, expected: Fraction | None) -> None:
    assert as_number(text) == expected


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_printed_float_is_read_back_exactly(number: float) -> None:
    assert as_number(repr(number)) == Fraction(repr(number))


@pytest.mark.parametrize(
    ("label", "answer", "expected"),
    [
        ("025", "25", True),
        ("27.0", "27", True),
        ("25", "52", False),
        ("52_8", "52_{8}", True),
        ("2516_8", "2516_9", False),  # math-verify calls them equal
        ("52_8", "52", None),
        ("2.88e-19", "2.88 \\times 10^{-19}", True),
        ("2.88e-19", "3.88e-19", False),  # math-verify rounds both to 0
        ("0.3333333", "0.33333333", None),
        ("62.5%", "0.625", None),
        ("62.5%", "62.5\\%", True),
        ("\\left(3,4\\right]", "(3, 4]", True),
        ("\\dfrac{17}{50}", "\\frac{17}{50}", True),
        ("E_{1},E_{2}", "E_1, E_2", True),
        ("\\frac{1}{23}", "\\frac{12}{3}", None),  # braces have a meaning
        ("12", "1 2", None),
        ("p - q", "q - p", None),
    ],
)
def test_text_and_digits_decide_only_what_they_can(label: str, answer: str, expected: bool | None) -> None:
    assert compare_plainly(label, answer) is expected


@pytest.mark.parametrize(
    ("label", "answer", "tolerance", "expected"),
    [
        ("1.6", "1.615", Tolerance(relative=0.01), True),
        ("1.6", "1.617", Tolerance(relative=0.01), False),
        ("-10", "-10.1", Tolerance(relative=0.01), True),  # on the edge, exactly
        ("560", "561", Tolerance(relative=0.01), True),
        ("4.5e33", "4.46 \\times 10^{33}", Tolerance(relative=0.01), True),
        ("4.2", "4.3", Tolerance(absolute=0.1), True),
        ("4.2", "4.31", Tolerance(absolute=0.1), False),
        ("0", "0.001", Tolerance(relative=0.01), False),
    ],
)
def test_a_tolerance_is_measured_from_the_label(label: str, answer: str, tolerance: Tolerance, expected: bool) -> None:
    assert compare_plainly(label, answer, tolerance=tolerance) is expected


def test_impossible_tolerances_are_refused() -> None:
    with pytest.raises(ValueError, match=r"relative 1\.0"):
        Tolerance(relative=1.0)
    with pytest.raises(ValueError, match="absolute -1"):
        Tolerance(absolute=-1)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("4.5e33", "4.5 \\times 10^{33}"),
        ("1e-5 \\text{ rad}", "1 \\times 10^{-5} \\text{ rad}"),
        ("y^{\\prime \\prime}+y^{\\prime}", "y''+y'"),
        ("3e^{2}", "3e^{2}"),  # Euler's number
        ("$E_{1}$", "E_1"),
        ("E_{12}", "E_{12}"),
    ],
)
def test_math_verify_gets_spellings_that_it_reads(answer: str, expected: str) -> None:
    assert for_math_verify(answer) == expected


def reference_last_boxed(text: str) -> str | None:
    """Box by box from the last one, each read to its own end."""
    for start in reversed([index for index in range(len(text)) if text.startswith("\\boxed{", index)]):
        depth, index = 1, start + len("\\boxed{")
        while index < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[index], 0)
            index += 2 if text[index] == "\\" else 1
        if depth == 0:
            return text[start + len("\\boxed{") : index - 1].strip()
    return None


@given(st.lists(st.sampled_from(["\\boxed{", "{", "}", "\\{", "\\}", "\\\\", "1", " "]), max_size=14))
def test_the_last_complete_box_is_found(parts: list[str]) -> None:
    assert last_boxed("".join(parts)) == reference_last_boxed("".join(parts))


def test_boxes_that_are_never_closed_cost_no_more_than_they_are_long() -> None:
    # Box by box this would be 10^10 steps.
    assert last_boxed("\\boxed{7}" + "\\boxed{" * 100_000) == "7"


def test_each_style_looks_in_its_own_place() -> None:
    response = "\\boxed{1}\nAnswer: 2"
    assert extract_answer(response, style="boxed", truncated=True) == "1"
    assert extract_answer(response, style="dapo", truncated=False) == "2"
    assert extract_answer(response, style="dapo", truncated=True) is None  # 2 might have become 25
