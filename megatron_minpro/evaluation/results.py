"""What an evaluation leaves for its readers: results.json, tables, a picture."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from checkpoints_convert.atomic_files import write_atomically
from megatron_minpro.evaluation import folder as places
from megatron_minpro.evaluation.grade_file import read_grades
from megatron_minpro.evaluation.grading import disagreements
from megatron_minpro.evaluation.problems import load_problems
from megatron_minpro.evaluation.scores import (
    CONFIDENCE,
    NUM_RESAMPLES,
    PASS_AT_K_BENCHMARKS,
    SEED,
    Counts,
    Incomplete,
    as_json,
    average_curves,
    average_pass_at_1,
    count,
)
from megatron_minpro.evaluation.settings import EvaluationSettings, read_settings
from megatron_minpro.evaluation.tables import Table, average_curves_table, curves_table, disagreements_table, scores_table, write_table
from megatron_minpro.tracking.json_lines import read_json_lines


def read_counts(out: Path, *, announce: Callable[[str], None]) -> tuple[EvaluationSettings, list[Counts]]:
    """Settings and counts of an evaluation's complete benchmarks; announce is told of others.

    Raises ValueError when there is no evaluation, or none of its benchmarks is complete.
    """
    settings = read_settings(out)
    if settings is None:
        raise ValueError(f"{out}: holds no evaluation")
    places.check_graded_alike(out)
    counts = []
    missing: list[Incomplete] = []
    for name, benchmark in settings.benchmarks.items():
        files = {"responses": places.responses_path(out, name), "grades": places.grades_path(out, name)}
        try:
            counts.append(count(name, benchmark.title, load_problems(places.problems_path(out, name)), samples=benchmark.samples, **files))
        except Incomplete as error:
            missing.append(error)
    if not counts:
        raise missing[0]
    for reason in missing:
        announce(f"left out as incomplete: {reason}")
    return settings, counts


def write_report(out: Path, *, announce: Callable[[str], None]) -> dict[str, Any]:
    """results.json, tables/ and pass_at_k.png of a complete evaluation. announce: takes the tables, for people. Returns the results."""
    from megatron_minpro.evaluation.curves import plot_curves  # here: matplotlib takes a second

    settings, counts = read_counts(out, announce=announce)
    model = "/".join(Path(settings.sampling.checkpoint).parts[-2:])
    average = average_pass_at_1(counts)
    scores, curves = scores_table(model, counts, average), curves_table(model, counts)
    differing = []
    for name in [item.benchmark for item in counts]:
        problems = {problem.problem_id: problem for problem in load_problems(places.problems_path(out, name))}
        differing += disagreements(name, problems, read_grades(places.grades_path(out, name)))
    tables = {"scores": scores, "pass_at_k": curves, "disagreements": disagreements_table(differing)}
    averages = table_2(model, counts)
    if averages is not None:
        tables["average_pass_at_k"] = averages
    for name, table in tables.items():
        write_table(out / places.TABLES_FOLDER, name, table)
    plot_curves(out / "pass_at_k.png", {model: counts})

    attempts = [record for _, record in read_json_lines(out / places.ATTEMPTS_FILE)]
    results = {
        "settings": asdict(settings),
        "interval": {"confidence": CONFIDENCE, "resamples_of_problems": NUM_RESAMPLES, "seed": SEED},
        "average_pass_at_1": asdict(average),
        "benchmarks": {item.benchmark: as_json(item) for item in counts},
        "disagreements": sum(item.samples for item in differing),
        "attempts": len(attempts),
        "torn_responses": sum(attempt["torn_responses"] for attempt in attempts),
        "torn_grades": sum(attempt["torn_grades"] for attempt in attempts),
    }
    write_atomically(out / places.RESULTS_FILE, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    announce(scores.markdown)
    announce(curves.markdown)
    if averages is not None:
        announce(averages.markdown)
    announce(_remarks(out, counts, sum(item.samples for item in differing)))
    return results


def table_2(model: str, counts: Sequence[Counts]) -> Table | None:
    """Table 2 of the paper; None unless all of its benchmarks were evaluated."""
    by_name = {item.benchmark: item for item in counts}
    if not set(PASS_AT_K_BENCHMARKS) <= by_name.keys():
        return None
    chosen = [by_name[name] for name in PASS_AT_K_BENCHMARKS]
    return average_curves_table(model, [item.title for item in chosen], average_curves(chosen))


def _remarks(out: Path, counts: list[Counts], differing: int) -> str:
    samples = sum(sum(item.num_samples) for item in counts)
    failures = _listed([item.grading_errors for item in counts]) or "none"
    endings = _listed([item.other_endings for item in counts])
    without_content = sum(item.without_content for item in counts)
    said = f", ended otherwise: {endings}" if endings else ""
    if without_content:
        said += (
            f", {without_content:,} without content (their reasoning was graded; a server without a reasoning parser gives the whole text)"
        )
    return (
        f"{samples:,} samples: {sum(item.without_answer for item in counts):,} without an answer, "
        f"{sum(item.truncated for item in counts):,} cut by the length limit{said}; failures of the grader: {failures}; "
        f"math-verify and plain comparison differ on {differing:,} samples ({out / places.TABLES_FOLDER / 'disagreements.md'})"
    )


def _listed(counts: Sequence[Mapping[str, int]]) -> str:
    """The sums of several counts: "2 timeout, 1 crash"."""
    total = sum((Counter(count) for count in counts), Counter[str]())
    return ", ".join(f"{number:,} {kind}" for kind, number in total.items())
