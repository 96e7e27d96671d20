"""Grading of real labels, of answers as models write them, and what happens when math-verify fails."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_minpro.evaluation.benchmarks import BENCHMARKS
from megatron_minpro.evaluation.grade_file import GradeFile, GradingThread, read_grades
from megatron_minpro.evaluation.grading import Disagreement, Grade, MathGrader, RewardGrader, disagreements
from megatron_minpro.evaluation.problems import Problem, read_problems
from megatron_minpro.evaluation.responses import Response, ResponseStore
from megatron_minpro.rewards.answers import Tolerance
from megatron_minpro.rewards.registry import make_reward

HANGS = "9^{9^{9^{9}}}"  # sympy would work it out


def problem(label: str, number: int = 0, tolerance: Tolerance | None = None) -> Problem:
    allowed = Tolerance() if tolerance is None else tolerance
    return Problem(
        problem_id=f"p{number}",
        question="?",
        label=label,
        relative_tolerance=allowed.relative,
        absolute_tolerance=allowed.absolute,
    )


def boxed(answer: str, of: Problem, sample: int = 0) -> Response:
    text = f"Therefore the answer is \\boxed{{{answer}}}."
    return Response(problem_id=of.problem_id, sample=sample, text=text, finish_reason="stop", num_tokens=9)


@pytest.fixture(scope="module")
def grader() -> Iterator[MathGrader]:
    made = MathGrader(style="boxed", timeout_s=30, workers=2)
    yield made
    made.close()


def judge(grader: MathGrader, label: str, answer: str, tolerance: Tolerance | None = None) -> bool:
    asked = problem(label, tolerance=tolerance)
    (grade,) = grader.grade([asked], [boxed(answer, asked)])
    assert grade.error is None
    return grade.correct


# ---------------------------------------------------------------------------------------------------------------- the real sets


def other_digit(label: str) -> str | None:
    """The label with its first digit changed: the nearest wrong answer that every label with a digit has."""
    digit = re.search(r"[0-9]", label)
    if digit is None:
        return None
    return label[: digit.start()] + str(int(digit[0]) % 9 + 1) + label[digit.end() :]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_gold_answer_is_correct_in_a_box_by_both_graders(name: str, assets: Path, grader: MathGrader) -> None:
    problems = read_problems(BENCHMARKS[name], data=assets, limit=None)
    grades = grader.grade(problems, [boxed(asked.label, asked) for asked in problems])
    # No exceptions: 40, 30, 30, 500, 675, 272 and 1319 of as many.
    assert [asked.label for asked, grade in zip(problems, grades, strict=True) if not (grade.correct and grade.math_verify)] == []
    assert [grade for grade in grades if grade.error is not None] == []


@pytest.mark.parametrize("name", BENCHMARKS)
def test_no_wrong_answer_is_correct(name: str, assets: Path, grader: MathGrader) -> None:
    problems = read_problems(BENCHMARKS[name], data=assets, limit=None)
    problems = problems[:: 1 if len(problems) < 100 else 8 if len(problems) < 1000 else 25]
    for wrong in (lambda label: "123456.75", lambda label: "\\text{nothing of the kind}", other_digit):
        asked = [item for item in problems if wrong(item.label) is not None]
        assert len(asked) >= 0.9 * len(problems)
        grades = grader.grade(asked, [boxed(str(wrong(item.label)), item) for item in asked])
        assert [(item.label, grade.extracted) for item, grade in zip(asked, grades, strict=True) if grade.correct or grade.error] == []


PERCENT = Tolerance(relative=0.01)


@pytest.mark.parametrize(
    ("label", "answer", "tolerance"),
    [
        # MATH500
        ("90^\\circ", "90 \\text{ degrees}", None),
        ("\\frac{270}7\\text{ degrees}", "\\frac{270}{7}^\\circ", None),
        ("864 \\mbox{ inches}^2", "864 \\text{ in}^2", None),
        ("\\$32,\\!348", "\\$32,348", None),
        ("11,\\! 111,\\! 111,\\! 100", "11111111100", None),
        ("52_8", "52", None),
        ("x \\in [-2,7]", "[-2, 7]", None),
        ("3, 5, 7", "7, 5, \\text{ and } 3", None),
        ("1 \\pm \\sqrt{19}", "1-\\sqrt{19}, 1+\\sqrt{19}", None),
        ("\\text{(C)}", "C", None),
        ("137 \\frac{1}{2}", "137.5", None),
        (
            "\\begin{pmatrix} -1/3 \\\\ 2/3 \\\\ 5/3 \\end{pmatrix}",
            "\\begin{pmatrix} -\\frac13 \\\\ \\frac23 \\\\ \\frac53 \\end{pmatrix}",
            None,
        ),
        # OlympiadBench
        ("$(1,8,19), (2,7,13), (4,5,7)$", "(4,5,7), (1,8,19), (2,7,13)", None),
        ("$f(x)=-1$,$f(x)=x+1$", "f(x)=x+1 \\text{ or } f(x)=-1", None),
        ("$90^{\\circ}$,$60^{\\circ}$", "60^\\circ, 90^\\circ", None),
        ("$(-\\infty, 0) \\cup\\{1\\}$.", "(-\\infty,0)\\cup\\{1\\}", None),
        ("$8 \\%$", "8", None),
        ("62.5%", "0.625", None),
        ("$2021 \\cdot 505 \\cdot 337$", "343943885", None),
        ("4.2", "4.3", Tolerance(absolute=0.1)),
        # Minerva
        ("4.5e33", "4.48 \\times 10^{33} \\text{ erg/s}", PERCENT),
        ("1.6", "1.61 \\text{ cm}", PERCENT),
        ("41.8", "41.7^\\circ", PERCENT),
        ("2.88e-19", "2.89 \\times 10^{-19} \\text{ J}", PERCENT),
        ("\\arcsin(10/13)", "0.878", PERCENT),
        ("-1/3", "-0.333", PERCENT),
        ("\\frac{1}{2a}(\\exp{a*t} - \\exp{-a*t})", "\\frac{e^{at}-e^{-at}}{2a}", PERCENT),
        ("y^{\\prime}+r y-r x(t)=0", "y'+ry-rx(t)=0", PERCENT),
    ],
)
def test_answers_as_models_write_them_are_correct(label: str, answer: str, tolerance: Tolerance | None, grader: MathGrader) -> None:
    assert judge(grader, label, answer, tolerance)


@pytest.mark.parametrize(
    ("label", "answer", "tolerance"),
    [
        ("x \\in [-2,7]", "(-2, 7]", None),
        ("3, 5, 7", "3, 5", None),
        ("1 \\pm \\sqrt{19}", "1+\\sqrt{19}", None),
        ("2516_8", "2516_9", None),
        ("$f(x)=-1$,$f(x)=x+1$", "f(x)=x+1", None),
        ("4.2", "4.3", None),
        ("4.5e33", "4.48 \\times 10^{32}", PERCENT),
        ("1.6", "1.62", PERCENT),
        ("2.88e-19", "3.88 \\times 10^{-19} \\text{ J}", PERCENT),  # math-verify rounds both to 0
        ("2.88e-19", "3.88 \\times 10^{-19} \\text{ J}", None),
        # math-verify cannot read these two, and would take the last number in them for all of it
        (
            "\\hbar \\omega(v+1 / 2)-\\frac{E_{0}^{2} e^{2}}{2 m \\omega^{2}}",
            "\\hbar \\omega(v+2 / 2)-\\frac{E_{0}^{2} e^{2}}{2 m \\omega^{2}}",
            PERCENT,
        ),
        ("2", "\\hbar \\omega(v+1 / 2)-\\frac{E_{0}^{2} e^{2}}{2 m \\omega^{2}}", None),
    ],
)
def test_answers_that_miss_are_wrong(label: str, answer: str, tolerance: Tolerance | None, grader: MathGrader) -> None:
    assert not judge(grader, label, answer, tolerance)


# ---------------------------------------------------------------------------------------------------------------- failures, disagreements


def test_a_hanging_answer_is_wrong_and_costs_its_limit_once_per_round() -> None:
    asked = problem("7")
    grader = MathGrader(style="boxed", timeout_s=2, workers=1)
    grades = grader.grade([asked] * 3, [boxed(HANGS, asked, 0), boxed(HANGS, asked, 1), boxed("14/2", asked, 2)])
    grader.close()
    assert [(grade.correct, grade.error) for grade in grades] == [(False, "timeout"), (False, "timeout"), (True, None)]


def test_a_response_without_an_answer_is_asked_of_nobody(grader: MathGrader) -> None:
    asked = problem("7")
    (grade,) = grader.grade([asked], [Response(problem_id="p0", sample=4, text="7", finish_reason="length", num_tokens=1)])
    assert grade == Grade(problem_id="p0", sample=4, correct=False, extracted=None, plain=None, math_verify=None, error=None)


def test_disagreements_are_counted_by_answer(grader: MathGrader) -> None:
    half, base = problem("\\frac{1}{2}", 0), problem("2516_8", 1)
    answers = [(half, "0.5"), (half, "0.5"), (half, "\\frac12"), (half, "0.7"), (half, "\\frac{1}{2}"), (base, "2516_9")]
    grades = grader.grade([asked for asked, _ in answers], [boxed(answer, asked, n) for n, (asked, answer) in enumerate(answers)])
    crash = Grade(problem_id="p0", sample=9, correct=False, extracted="x", plain=None, math_verify=None, error="crash")
    found = disagreements("set", {"p0": half, "p1": base}, [*grades, crash])
    assert [(item.answer, item.plain, item.math_verify, item.counted_as, item.samples) for item in found] == [
        ("0.5", False, "equal", "correct", 2),
        ("\\frac12", False, "equal", "correct", 1),
        ("2516_9", False, "equal", "wrong", 1),
        ("x", False, "crash", "wrong", 1),
    ]
    assert found[0] == Disagreement(
        benchmark="set",
        problem_id="p0",
        label="\\frac{1}{2}",
        answer="0.5",
        plain=False,
        math_verify="equal",
        counted_as="correct",
        samples=2,
    )


def test_a_reward_of_training_grades_too() -> None:
    asked = problem("4")
    texts = ["3 + 4 = 7 ; 7 * 2 = 4 ;", "3 + 4 = 7 ;"]
    responses = [Response(problem_id="p0", sample=n, text=text, finish_reason="stop", num_tokens=5) for n, text in enumerate(texts)]
    grades = RewardGrader(make_reward("megatron_minpro.tasks.arithmetic_chains.reward:final_step")).grade([asked] * 2, responses)
    assert [(grade.sample, grade.correct, grade.extracted) for grade in grades] == [(0, True, "4"), (1, False, "7")]


# ---------------------------------------------------------------------------------------------------------------- while sampling goes on


class Counting:
    """Correct when the text says so; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: Counter[tuple[str, int]] = Counter()

    def grade(self, problems: list[Problem], responses: list[Response]) -> list[Grade]:
        assert [asked.problem_id for asked in problems] == [response.problem_id for response in responses]
        self.asked.update(response.key for response in responses)
        return [
            Grade(
                problem_id=x.problem_id,
                sample=x.sample,
                correct=x.text == "good",
                extracted=x.text,
                plain=None,
                math_verify=None,
                error=None,
            )
            for x in responses
        ]

    def close(self) -> None: ...


def test_responses_are_graded_as_they_arrive_and_once_over_attempts(tmp_path: Path) -> None:
    problems = [problem("1", 0), problem("2", 1)]
    store = ResponseStore(tmp_path / "responses.jsonl")
    counting, seen = Counting(), []

    def attempt(samples: range) -> None:
        file = GradeFile(problems, responses=store.path, grades=tmp_path / "grades.jsonl")
        with GradingThread([file], counting, on_progress=seen.append) as grading:
            for sample in samples:
                for asked in problems:
                    text = "good" if sample % 2 else "bad"
                    store.append(Response(problem_id=asked.problem_id, sample=sample, text=text, finish_reason="stop", num_tokens=1))
                    grading.check()
            grading.finish()
        file.close()

    attempt(range(200))
    attempt(range(200, 300))
    assert set(counting.asked.values()) == {1} and len(counting.asked) == 600
    assert [grade.correct for grade in read_grades(tmp_path / "grades.jsonl")] == [bool(n // 2 % 2) for n in range(600)]
    assert seen[-1] == 600


def test_a_grader_that_breaks_stops_the_evaluation(tmp_path: Path) -> None:
    class Broken(Counting):
        def grade(self, problems: list[Problem], responses: list[Response]) -> list[Grade]:
            raise RuntimeError("no math-verify here") if responses else AssertionError

    store = ResponseStore(tmp_path / "responses.jsonl")
    store.append(boxed("1", problem("1")))
    file = GradeFile([problem("1")], responses=store.path, grades=tmp_path / "grades.jsonl")
    with GradingThread([file], Broken(), on_progress=lambda done: None) as grading, pytest.raises(RuntimeError, match="no math-verify"):
        grading.finish()


def test_a_response_to_an_unknown_problem_and_a_double_grade_are_refused(tmp_path: Path) -> None:
    store = ResponseStore(tmp_path / "responses.jsonl")
    store.append(boxed("1", problem("1", 5)))
    file = GradeFile([problem("1")], responses=store.path, grades=tmp_path / "grades.jsonl")
    with pytest.raises(ValueError, match="answers a problem p5 that is not in the benchmark"):
        file.grade_some(Counting())
    line = '{"problem_id": "p0", "sample": 0, "correct": true, "extracted": "1", "plain": true, "math_verify": true, "error": null}\n'
    (tmp_path / "twice.jsonl").write_text(2 * line)
    with pytest.raises(ValueError, match="sample 0 of problem p0 is graded twice"):
        GradeFile([problem("1")], responses=store.path, grades=tmp_path / "twice.jsonl")
