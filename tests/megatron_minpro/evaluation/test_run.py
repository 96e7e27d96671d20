"""A kept evaluation without any server: graded again, reported, compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from megatron_minpro.evaluation import folder as places
from megatron_minpro.evaluation import run
from megatron_minpro.evaluation.compare import compare_folders
from megatron_minpro.evaluation.grade_file import read_grades
from megatron_minpro.evaluation.problems import Problem, write_problems
from megatron_minpro.evaluation.responses import Response
from megatron_minpro.evaluation.results import read_counts
from megatron_minpro.evaluation.run import rescore
from megatron_minpro.evaluation.settings import (
    BenchmarkSettings,
    EvaluationSettings,
    GradingSettings,
    SamplingSettings,
    digest,
    read_settings,
    write_settings,
)

FINAL_STEP = "megatron_minpro.tasks.arithmetic_chains.reward:final_step"

LABELS = ("25", "\\frac{1}{2}", "x=5")
ANSWERS = {0: ("025", "26"), 1: ("0.5", "\\frac12"), 2: ("6", None)}  # the samples of each problem; None: no box


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """An evaluation of LABELS as it lies after sampling: two samples each, not graded."""

    def make(
        name: str, *, labels: tuple[str, ...] = LABELS, answers: dict[int, tuple[str | None, ...]] = ANSWERS, samples: int = 2
    ) -> Path:
        out = tmp_path / name
        problems = [
            Problem(problem_id=f"p{n}", question=f"q\u2028{n}\u0085", label=label, relative_tolerance=0.0, absolute_tolerance=0.0)
            for n, label in enumerate(labels)
        ]
        for path in (places.problems_path(out, "set"), places.responses_path(out, "set")):
            path.parent.mkdir(parents=True)
        write_problems(places.problems_path(out, "set"), problems)
        responses = [
            Response(
                problem_id=f"p{number}",
                sample=sample,
                text="I do not know" if answer is None else f"\\boxed{{{answer}}}",
                finish_reason="length" if answer is None else "stop",
                num_tokens=10,
            )
            for number, given in answers.items()
            for sample, answer in enumerate(given)
        ]
        text = "".join(json.dumps(asdict(response)) + "\n" for response in responses)
        places.responses_path(out, "set").write_text(text)
        sampling = SamplingSettings(
            checkpoint="/models/tiny",
            weights="1",
            api="token_ids",
            style="boxed",
            temperature=1.0,
            top_p=0.7,
            max_new_tokens=10,
            end_token_ids="2",
            seed=0,
        )
        benchmark = BenchmarkSettings(
            title="SET", samples=samples, num_problems=len(labels), problems=digest([asdict(x) for x in problems]), prompts="1"
        )
        write_settings(
            out,
            EvaluationSettings(
                sampling=sampling, grading=GradingSettings(grader="math_verify", timeout_s=30.0), benchmarks={"set": benchmark}
            ),
        )
        return out

    return make


def grade_again(out: Path, **changed: Any) -> tuple[dict[str, Any], list[str]]:
    said: list[str] = []
    options = {"grader": None, "timeout_s": None, "workers": 1, **changed}
    return rescore(out, announce=said.append, **options), said


def test_kept_responses_are_graded_counted_and_shown(make_folder: Callable[..., Path]) -> None:
    out = make_folder("a")
    results, said = grade_again(out)
    found = results["benchmarks"]["set"]
    # Correct: 025 of two, both halves, none. pass@1 = (1/2 + 1 + 0) / 3; pass@2 unbiased = (1 + 1 + 0) / 3, with replacement (3/4 + 1) / 3.
    assert found["correct_per_problem"] == {"p0": 1, "p1": 2, "p2": 0}
    means = {(entry["estimator"], entry["k"]): entry["mean"] for entry in found["pass_at_k"]}
    assert means == pytest.approx({("unbiased", 1): 0.5, ("unbiased", 2): 2 / 3, ("bootstrap", 1): 0.5, ("bootstrap", 2): 1.75 / 3})
    assert (found["samples"], found["without_answer"], found["truncated"], found["mean_tokens"]) == (6, 1, 1, 10.0)
    assert results["disagreements"] == 2  # 0.5 and \frac12: one half, though not by their letters
    assert results["settings"]["grading"] == {"grader": "math_verify", "timeout_s": 30.0}
    assert json.loads((out / "results.json").read_text()) == results
    assert "| models/tiny | 50.0" in said[0] and "6 samples: 1 without an answer, 1 cut by the length limit" in said[-1]
    table = (out / "tables/disagreements.md").read_text()
    assert "0.5" in table and "\\frac12" in table and "equal" in table


def test_grading_again_with_another_grader_replaces_the_grades_and_says_so(make_folder: Callable[..., Path]) -> None:
    out = make_folder("a", answers={n: ("1 + 3 = 5 ;", "5") for n in range(3)}, labels=("5", "5", "6"))
    grade_again(out)
    first = places.grades_path(out, "set").read_bytes()
    results, _ = grade_again(out, timeout_s=20.0)
    assert places.grades_path(out, "set").read_bytes() == first
    settings = read_settings(out)
    assert settings is not None and settings.grading == GradingSettings(grader="math_verify", timeout_s=20.0)
    assert results["benchmarks"]["set"]["correct"] == 2  # "5" for two labels; "1 + 3 = 5 ;" is false
    grade_again(out, grader=FINAL_STEP)
    assert sum(grade.correct for grade in read_grades(places.grades_path(out, "set"))) == 0


def test_a_failing_rescore_leaves_the_old_grades(make_folder: Callable[..., Path]) -> None:
    out = make_folder("a")
    grade_again(out)
    before = places.grades_path(out, "set").read_bytes(), (out / "settings.json").read_bytes()
    with pytest.raises(ValueError, match="has no 'final_stop'; did you mean 'final_step'"):
        grade_again(out, grader=FINAL_STEP.replace("step", "stop"))
    with places.responses_path(out, "set").open("ab") as file:
        file.write(b'{"no": "response"}\n')
    with pytest.raises(ValueError, match="is not a response"):
        grade_again(out, grader=FINAL_STEP)
    assert (places.grades_path(out, "set").read_bytes(), (out / "settings.json").read_bytes()) == before


def test_a_rescore_killed_among_its_files_is_said_and_can_be_repeated(
    make_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = make_folder("a")
    grade_again(out)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run, "write_settings", killed)
        grade_again(out, timeout_s=20.0)
    with pytest.raises(ValueError, match="a: a rescore was killed while its grades replaced the old ones"):
        compare_folders(out, out, announce=lambda text: None)
    grade_again(out)
    compare_folders(out, out, announce=lambda text: None)


def test_an_interrupted_benchmark_is_left_out_aloud(make_folder: Callable[..., Path]) -> None:
    out = make_folder("a", samples=3)
    with pytest.raises(ValueError, match="set has 2 responses for problem p0, expected 3 for each of 3 problems"):
        grade_again(out)
    content = json.loads((out / "settings.json").read_text())
    content["benchmarks"]["other"] = content["benchmarks"]["set"] | {"samples": 2}
    (out / "settings.json").write_text(json.dumps(content))
    for path in (places.problems_path, places.responses_path):
        path(out, "other").write_bytes(path(out, "set").read_bytes())
    results, said = grade_again(out)
    assert list(results["benchmarks"]) == ["other"]
    assert any(line.startswith("left out as incomplete: ") and "set has 2 responses" in line for line in said)


def test_two_folders_are_compared_problem_by_problem(make_folder: Callable[..., Path]) -> None:
    first, second = make_folder("a"), make_folder("b", answers={0: ("25", "25"), 1: ("1/2", "0.5"), 2: ("5", None)})
    for out in (first, second):
        grade_again(out)
    table = compare_folders(first, second, announce=lambda text: None)
    row = table.rows[0]
    # Per problem: +1/2, 0, +1/2.
    assert (row["k"], row["first"], row["second"], row["difference"]) == (1, 0.5, pytest.approx(5 / 6), pytest.approx(1 / 3))
    assert (row["low"], row["high"]) == (0.0, 0.5)
    assert str(first) in table.markdown and "+33.3 [+0.0, +50.0]" in table.markdown


def test_what_two_folders_differ_in_beside_their_weights_is_said(make_folder: Callable[..., Path]) -> None:
    first, second = make_folder("a"), make_folder("b", answers={n: ("25",) for n in range(3)}, samples=1)
    for out in (first, second):
        grade_again(out)
    content = json.loads((second / "settings.json").read_text())
    content["sampling"] |= {"temperature": 0.6, "checkpoint": "/models/other", "seed": 1}
    (second / "settings.json").write_text(json.dumps(content))
    said: list[str] = []
    table = compare_folders(first, second, announce=said.append)
    assert said[0] == "the two differ in more than their weights: temperature 1.0 and 0.6"
    assert said[1].startswith("SET: 2 and 1 samples per problem") and len(said) == 2
    assert [row["k"] for row in table.rows] == [1, 1]


def test_bare_responses_are_not_graded_by_math_verify(make_folder: Callable[..., Path]) -> None:
    out = make_folder("a")
    content = json.loads((out / "settings.json").read_text())
    content["sampling"]["style"] = "bare"
    (out / "settings.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="--style bare says nowhere where the answer stands"):
        grade_again(out, grader="math_verify")


def test_folders_that_do_not_match_are_not_compared(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    first, other_label = make_folder("a"), make_folder("b", labels=("25", "\\frac{1}{2}", "x=6"))
    for out in (first, other_label):
        grade_again(out)
    with pytest.raises(ValueError, match="have different problems, labels or tolerances"):
        compare_folders(first, other_label, announce=lambda text: None)
    with pytest.raises(ValueError, match="holds no evaluation"):
        compare_folders(first, tmp_path, announce=lambda text: None)
    settings, counts = read_counts(first, announce=lambda text: None)
    assert list(settings.benchmarks) == [item.benchmark for item in counts] == ["set"]
