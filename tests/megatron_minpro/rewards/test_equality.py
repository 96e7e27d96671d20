"""Answers as people and models write them, by kind; and numbers against Fraction."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_minpro.rewards.answers import AnswerStyle, compare_plainly, extract_answer
from megatron_minpro.rewards.equality import same_answer
from megatron_minpro.rewards.grader_pool import GraderPool


@pytest.fixture(scope="module")
def pool() -> Iterator[GraderPool]:
    with GraderPool(workers=1, timeout_s=30, memory_mb=4096) as started:
        yield started


def judge(pool: GraderPool, style: AnswerStyle, label: str, response: str) -> bool:
    """As the reward and the evaluation do it."""
    answer = extract_answer(response, style=style, truncated=False, label=label)
    if answer is None:
        return False
    plain = compare_plainly(label, answer)
    if plain is not None:
        return plain
    (verdict,) = pool.compare([(label, answer)])
    assert verdict.error is None
    return verdict.equal is True


# ---------------------------------------------------------------------------------------------------------------- where the answer stands


@pytest.mark.parametrize(
    "response",
    [
        "Answer:\n\n$$\n72\n$$\nDone.",
        "Answer:\n\\[\n72\n\\]",
        "Answer:\n```\n72\n```",
        "Answer: $$\n72\n$$",
        "Answer:\n\\begin{align*}\n72\n\\end{align*}",
        "Answer:\n\\boxed{\n72\n}",
        "Answer:\n---\n> **72**",
        "Answer: The value is\n\n$72$",
        "***Answer***: 72",
        "`Answer`: **72**",
        "\\textbf{Answer:} 72",
        "### Answer ： 72",
        "Answer: 7\nI was wrong.\n*Answer*: 72\n**Answer:**",
        "Answer: 72, because 8 and 9 are coprime.",
        "Answer: 72 (since 8 * 9 = 72)",
        "Answer: There are 72 ways.",
        "Answer: “72”。",
        "Answer: ~72",
        "Answer: **72** ✓",
        "Answer: 72; the sum is even.",
        "Answer: 72 sq. units",
        "Answer: There are exactly 72 of them",
    ],
)
def test_the_answer_is_found_behind_its_mark(pool: GraderPool, response: str) -> None:
    assert judge(pool, "dapo", "72", response)
    assert not judge(pool, "dapo", "27", response)


@pytest.mark.parametrize(
    "answer",
    [
        "72 or 73",
        "72 - 70",
        "not 72",
        "more than 72",
        "> 72",
        "72 million",
        "72x",
        "72\\pi",
        "72 base 9",
        "72:00",
        "between 72 and 80",
        "72 is wrong",
        "72!",
    ],
)
def test_words_and_signs_that_change_a_number_change_the_verdict(pool: GraderPool, answer: str) -> None:
    assert not judge(pool, "dapo", "72", f"Answer: {answer}")


@pytest.mark.parametrize(
    ("label", "response", "expected"),
    [
        ("2, 3", "$\\boxed{2}$ and $\\boxed{3}$", True),
        ("2, 3", "$x_1=\\boxed{3}$, $x_2=\\boxed{2}$", True),
        ("2, 3", "The first is \\boxed{2}. The second is \\boxed{3}.", True),
        ("2, 3", "Not \\boxed{7}. So \\boxed{2}, \\boxed{3}.", True),
        ("2, 3", "\\boxed{2}, \\boxed{3}, \\boxed{4}", False),
        ("2, 3", "\\boxed{3}", False),
        ("3", "\\boxed{2}, no, \\boxed{3}", True),
        ("2", "\\boxed{2}, no, \\boxed{3}", False),
        ("(2, 3)", "\\boxed{2} and \\boxed{(2,3)}", True),
        ("1,234", "\\boxed{5} and \\boxed{1234}", True),
    ],
)
def test_boxes_count_together_where_the_label_has_several_parts(pool: GraderPool, label: str, response: str, expected: bool) -> None:
    assert judge(pool, "boxed", label, response) is expected


# ---------------------------------------------------------------------------------------------------------------- what the answer states

RIGHT = {
    "beyond float64": [
        ("5^{1001}", "5\\cdot 25^{500}"),
        ("300!", "300\\cdot 299!"),
        ("7^{900}\\pi", "7\\cdot 7^{899}\\pi"),
        ("e^{2000}", "e^{999}e^{1001}"),
        ("\\frac{1}{3^{800}}", "9^{-400}"),
    ],
    "equation": [("6", "n=6"), ("6", "6=n"), ("6", "2\\cdot 3 = 6"), ("6", "x = 2+4 = 6"), ("6", "a+b=6"), ("6", "f(3)=6"), ("n=6", "6")],
    "unit": [
        ("6\\text{ m}", "600\\text{ cm}"),
        ("6\\text{ m}", "6 meters"),
        ("6", "6\\,\\mathrm{kg}"),
        ("\\$6", "600 cents"),
        ("3\\pi", "3\\pi\\text{ cm}^2"),
        ("6\\text{ square feet}", "6 ft²"),
        ("50\\%", "\\frac12"),
    ],
    "typography": [
        ("\\frac{3}{4}", "¾"),
        ("3\\sqrt{5}", "3√5"),
        ("-6", "−６"),
        ("4\\times 10^{-9}", "4×10⁻⁹"),
        ("30^\\circ", "30º"),
        ("1234567", "1\u2009234\u2009567"),
        ("1234567", "1'234'567"),
        ("6", "\\textcolor{blue}{6}"),
        ("6", "{\\color{red} 6}"),
        ("1024", "2**10"),
    ],
    "repeating decimal": [("\\frac{5}{6}", "0.8\\overline{3}"), ("\\frac{4}{33}", "0.1212..."), ("\\frac19", "0.\\dot1"), ("1", "0.(9)")],
    "mixed number": [
        ("\\frac{11}{4}", "2 3/4"),
        ("-\\frac{11}{4}", "-2¾"),
        ("2.75", "2\\dfrac34"),
        ("\\frac{11}{4}", "2\\text{ and }\\frac34"),
    ],
    "inequality": [
        ("(-\\infty,3]", "x \\le 3"),
        ("(2,5]", "5 ≥ t > 2"),
        ("(-\\infty,0)\\cup(3,\\infty)", "x<0\\text{ or }x>3"),
        ("x>3", "(3,\\infty)"),
        ("0<x<3", "3>x>0"),
    ],
    "base": [("38", "46_8"), ("255", "FF_{16}"), ("46_8", "46"), ("46_8", "46_{\\text{eight}}"), ("46_8", "(46)_{8}")],
    "time": [("4:05", "04:05"), ("4:05\\text{ PM}", "4:05")],
    "list": [("\\{1,5\\}", "5, 1"), ("(2^{90},\\frac12)", "(8^{30},0.5)"), ("1, 5", "x=5 \\text{ or } x=1")],
}
WRONG = {
    "beyond float64": [
        ("5^{1001}", "5^{1001}+1"),
        ("\\frac{1}{5^{300}}", "\\frac{1}{5^{301}}"),
        ("e^{-900}", "e^{-901}"),
        ("10^{-20}x", "10^{-21}x"),
        ("[10^{-30},1]", "[10^{-31},1]"),
        ("\\frac{10^{30}}{7}", "\\frac{10^{30}+1}{7}"),
        ("\\sqrt{10^{40}+1}", "10^{20}"),
    ],
    "equation": [("6", "x^2=6"), ("6", "2x=6"), ("6", "x-1=6"), ("6", "3+4=6"), ("6", "7=6"), ("6", "\\log_2 8=6"), ("2,3", "x^2=2,x=3")],
    "unit": [("6\\text{ m}", "6\\text{ cm}"), ("6\\text{ m}", "6\\text{ m}^2"), ("\\$6", "6 cents"), ("\\pi\\text{ m}", "\\pi\\text{ km}")],
    "typography": [("210", "2**10"), ("-6", "6"), ("6", "\\color{red}{7}"), ("12", "1 2")],
    "repeating decimal": [("\\frac13", "0.33"), ("0.\\overline{3}", "0.3"), ("\\frac19", "0.\\overline{12}")],
    "mixed number": [("\\frac{11}{4}", "23/4"), ("\\frac{3}{2}", "1-1/2")],
    "inequality": [("(-\\infty,3]", "x<3"), ("(2,5]", "2\\le x<5")],
    "base": [("46", "46_8"), ("46_8", "46_9"), ("46", "46\\text{ (base 8)}")],
    "time": [("4:05", "4/5"), ("4:05", "5:04"), ("4:05\\text{ PM}", "4:05\\text{ AM}")],
    "list": [("(1,5)", "\\{1,5\\}"), ("\\{1,5\\}", "[1,5]"), ("(1,5)", "(5,1)"), ("1, 5", "1, 5, 6")],
}  # fmt: skip


@pytest.mark.parametrize("kind", RIGHT)
def test_other_spellings_of_an_answer_are_right(pool: GraderPool, kind: str) -> None:
    assert [pair for pair in RIGHT[kind] if not judge(pool, "boxed", pair[0], f"So \\boxed{{{pair[1]}}}.")] == []


@pytest.mark.parametrize("kind", WRONG)
def test_near_misses_are_wrong(pool: GraderPool, kind: str) -> None:
    assert [pair for pair in WRONG[kind] if judge(pool, "boxed", pair[0], f"So \\boxed{{{pair[1]}}}.")] == []


def test_at_least_37_of_39_collected_cases_are_judged_as_a_person_would(pool: GraderPool, assets: Path) -> None:
    with (assets / "cases/grading.jsonl").open(encoding="utf-8") as file:
        cases = [json.loads(line) for line in file]
    missed = [case for case in cases if judge(pool, case["style"], case["label"], case["response"]) is not case["right"]]
    assert len(cases) == 39
    assert len(missed) <= 2, missed


# ---------------------------------------------------------------------------------------------------------------- against Fraction


def by_rules(label: str, answer: str) -> bool:
    """The verdict of the exact rules; asking math-verify is an error."""

    def unasked(label: str, answer: str) -> bool:
        raise AssertionError(f"{label} and {answer} are numbers")

    return same_answer(label, answer, relative=0.0, absolute=0.0, same_mathematics=unasked)


def spellings(value: Fraction) -> st.SearchStrategy[str]:
    """Ways to write a fraction exactly."""
    above, below = value.numerator, value.denominator
    ways = [f"\\frac{{{above}}}{{{below}}}", f"{above}/{below}", f"${above}\\div {below}$", f"x = \\dfrac{{{above}}}{{{below}}}"]
    ways += [f"\\frac{{{3 * above}}}{{{3 * below}}}", f"{above} \\cdot {below}^{{-1}}", f"**{above}/{below}**."]
    if value >= 0:
        ways.append(f"{above // below}+\\frac{{{above % below}}}{{{below}}}")
        if above % below and above >= below:
            ways += [f"{above // below} {above % below}/{below}", f"{above // below}\\frac{{{above % below}}}{{{below}}}"]
    if below == 1:
        ways += [str(above), f"{above:,}", f"{above}\\text{{ units}}", f"\\boxed{{{above}}}"]
    return st.sampled_from(ways)


fractions = st.one_of(
    st.builds(Fraction, st.integers(-(10**40), 10**40), st.integers(1, 10**40)),
    st.builds(Fraction, st.integers(-99, 99), st.integers(1, 99)),
)


@settings(deadline=None)  # the machine may be busy
@given(st.data(), fractions)
def test_one_number_in_two_spellings_is_one_number(data: st.DataObject, value: Fraction) -> None:
    assert by_rules(data.draw(spellings(value)), data.draw(spellings(value)))


@settings(deadline=None)  # the machine may be busy
@given(st.data(), fractions, st.integers(1, 10**50), st.sampled_from([1, -1]))
def test_numbers_that_differ_by_ever_so_little_are_two(data: st.DataObject, value: Fraction, inverse: int, sign: int) -> None:
    other = value + Fraction(sign, inverse)
    assert not by_rules(data.draw(spellings(value)), data.draw(spellings(other)))


@settings(deadline=None)  # the machine may be busy
@given(st.integers(2, 40), st.integers(1, 900), st.integers(0, 2))
def test_powers_and_factorials_of_any_size_are_compared_exactly(base: int, power: int, off: int) -> None:
    assert by_rules(f"{base}^{{{power + 1}}}", f"{base}\\cdot {base}^{{{power}}}+{off}") is (off == 0)
    assert by_rules(f"\\frac{{1}}{{{base}^{{{power}}}}}", f"\\frac{{{off + 1}}}{{{base}^{{{power}}}}}") is (off == 0)
    assert by_rules(f"{power}!", str(math.factorial(power) + off)) is (off == 0)


_PIECES = [
    "1",
    "2",
    "x",
    "\\frac",
    "{",
    "}",
    "(",
    ")",
    "[",
    "\\{",
    "\\}",
    "=",
    "<",
    "\\le ",
    ",",
    ":",
    "^",
    "_",
    "!",
    "%",
    "\\text{",
    "cm",
    " ",
    "or",
]
_PIECES += [
    "\\sqrt",
    "0.",
    "\\overline",
    "...",
    "½",
    "√",
    "²",
    "°",
    "\\$",
    "$",
    "\\boxed{",
    "base",
    "pm",
    "\\approx ",
    "-",
    "/",
    "\\",
    "**",
    "`",
    "|",
]
scraps = st.lists(st.sampled_from(_PIECES), max_size=12).map("".join)


@settings(deadline=None)
@given(scraps, scraps)
def test_scraps_of_latex_break_no_rule(label: str, answer: str) -> None:
    for style in ("dapo", "boxed"):
        found = extract_answer(f"Answer: {answer}\n\\boxed{{{answer}}}", style=style, truncated=False, label=label)  # type: ignore[arg-type]
        assert found is None or isinstance(found, str)
    assert compare_plainly(label, answer) in (True, False, None)
    verdicts = [
        same_answer(here, there, relative=0.0, absolute=0.0, same_mathematics=lambda *_: False)
        for here, there in ((label, label + " "), (label, answer))
    ]
    assert all(isinstance(verdict, bool) for verdict in verdicts)
