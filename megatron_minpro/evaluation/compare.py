"""Two evaluations of the same problems: the paired difference of pass@k and its interval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_minpro.evaluation.results import read_counts
from megatron_minpro.evaluation.scores import CONFIDENCE, ESTIMATORS, NUM_RESAMPLES, SEED, Counts
from megatron_minpro.evaluation.settings import EvaluationSettings
from megatron_minpro.evaluation.tables import Table, markdown_table
from megatron_minpro.report.pass_at_k import Estimator, bootstrap_interval, pass_at_k_values


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """pass@k of the second run minus that of the first, mean over the problems they share."""

    benchmark: str
    estimator: Estimator
    k: int
    first: float
    second: float
    difference: float
    low: float
    high: float
    problems: int


def differences(first: Counts, second: Counts) -> list[Difference]:
    """For every k that both runs have the samples for. Problems are resampled in pairs: what makes a problem hard for both cancels.

    The bootstrap estimator's bias depends on the number of samples, so where the runs differ in it only its k = 1 is compared.
    Raises ValueError when the two did not answer the same problems.
    """
    if first.problem_ids != second.problem_ids:
        strange = set(first.problem_ids) ^ set(second.problem_ids)
        raise ValueError(f"--compare: {first.benchmark}: the runs answered different problems ({len(strange)} are in one alone)")
    found = []
    for estimator in ESTIMATORS:
        for k in sorted(set(first.ks) & set(second.ks)):
            if estimator == "bootstrap" and k > 1 and first.num_samples != second.num_samples:
                continue
            here, there = (pass_at_k_values(counts.num_samples, counts.num_correct, k=k, estimator=estimator) for counts in (first, second))
            gap_P = there - here
            low, high = bootstrap_interval(gap_P, seed=SEED, num_resamples=NUM_RESAMPLES, confidence=CONFIDENCE)
            found.append(
                Difference(
                    benchmark=first.title,
                    estimator=estimator,
                    k=k,
                    first=float(here.mean()),
                    second=float(there.mean()),
                    difference=float(gap_P.mean()),
                    low=low,
                    high=high,
                    problems=len(gap_P),
                )
            )
    return found


def compare_folders(first: Path, second: Path, *, announce: Callable[[str], None]) -> Table:
    """The differences, second minus first, of all benchmarks that both evaluations have; announce is told what else the two differ in.

    Raises ValueError when there is none, and when the two did not answer the same problems with the same labels.
    """
    (settings, counts), (other_settings, other_counts) = (read_counts(folder, announce=announce) for folder in (first, second))
    others = {item.benchmark: item for item in other_counts}
    shared = [(item, others[item.benchmark]) for item in counts if item.benchmark in others]
    if not shared:
        raise ValueError(f"--compare: {first} and {second} have no benchmark in common")
    for item, _ in shared:
        if settings.benchmarks[item.benchmark].problems != other_settings.benchmarks[item.benchmark].problems:
            raise ValueError(f"--compare: {item.benchmark}: {first} and {second} have different problems, labels or tolerances")
    for text in other_conditions(settings, other_settings):
        announce(f"the two differ in more than their weights: {text}")
    for here, there in shared:
        if here.num_samples != there.num_samples:
            announce(
                f"{here.title}: {here.num_samples[0]} and {there.num_samples[0]} samples per problem; "
                "the bootstrap estimator is biased by their number, so beyond k = 1 it is left out"
            )
    found = [difference for here, there in shared for difference in differences(here, there)]
    return comparison_table(found, names=(str(first), str(second)))


def other_conditions(first: EvaluationSettings, second: EvaluationSettings) -> list[str]:
    """How the two were sampled and graded differently: "temperature 1.0 and 0.7". Another seed is another draw of the same."""
    texts = []
    for here, there in ((first.sampling, second.sampling), (first.grading, second.grading)):
        before, after = asdict(here), asdict(there)
        names = [name for name in before if name not in ("checkpoint", "weights", "seed") and before[name] != after[name]]
        texts += [f"{name} {before[name]} and {after[name]}" for name in names]
    return texts


def comparison_table(found: Sequence[Difference], *, names: tuple[str, str]) -> Table:
    """In percent; a star marks an interval that does not hold 0."""
    header = ["benchmark", "estimator", "k", names[0], names[1], "difference, 95% interval", "problems"]
    lines = [
        [
            item.benchmark,
            item.estimator,
            str(item.k),
            f"{100 * item.first:.1f}",
            f"{100 * item.second:.1f}",
            f"{100 * item.difference:+.1f} [{100 * item.low:+.1f}, {100 * item.high:+.1f}]{' *' if item.low > 0 or item.high < 0 else ''}",
            str(item.problems),
        ]
        for item in found
    ]
    return Table(rows=[asdict(item) for item in found], markdown=markdown_table(header, lines))
