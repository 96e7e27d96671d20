"""One evaluation from its plan to its tables. Reads top to bottom: prepare, sample what is missing, grade, count, write."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from checkpoints_convert.atomic_files import write_atomically
from megatron_minpro.batch.prompt import Prompt
from megatron_minpro.evaluation import folder as places
from megatron_minpro.evaluation.grade_file import GradeFile, GradingThread
from megatron_minpro.evaluation.grading import make_grader
from megatron_minpro.evaluation.plan import Plan, wrapped
from megatron_minpro.evaluation.problems import Problem, load_problems, write_problems
from megatron_minpro.evaluation.progress import EvaluationProgress
from megatron_minpro.evaluation.responses import Response, ResponseStore
from megatron_minpro.evaluation.results import write_report
from megatron_minpro.evaluation.settings import SETTINGS_FILE, GradingSettings, merged, read_settings, write_settings
from megatron_minpro.evaluation.sources import open_source
from megatron_minpro.tracking.json_lines import JsonLines


def evaluate(plan: Plan, *, announce: Callable[[str], None]) -> dict[str, Any]:
    """Sample what is missing, grade, write tables and pictures; the content of results.json.

    Raises ValueError for input that cannot work, RuntimeError when servers or graders cannot; what was sampled until then is kept, and
    the same request continues.
    """
    request, out = plan.request, plan.out
    with places.ownership(out), ExitStack() as closing:
        places.check_graded_alike(out)
        # Read again under the lock: another process may have finished meanwhile.
        kept = read_settings(out)
        settings = plan.settings if kept is None else merged(kept, plan.settings, folder=out)
        for name, problems in plan.problems.items():
            path = places.problems_path(out, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_problems(path, problems)
        write_settings(out, settings)

        stores = {name: ResponseStore(places.responses_path(out, name)) for name in plan.problems}
        grades = {name: _grade_file(out, name, problems) for name, problems in plan.problems.items()}
        for close in (*(store.close for store in stores.values()), *(file.close for file in grades.values())):
            closing.callback(close)
        kept_responses, total = sum(map(len, stores.values())), plan.num_responses
        _note_attempt(out, kept_responses, stores.values(), grades.values())
        if kept_responses:
            announce(f"{out}: {kept_responses:,} of {total:,} responses are there already")

        graded = plan.settings.grading
        grader = make_grader(graded.grader, style=request.style, timeout_s=graded.timeout_s, workers=request.grading_workers)
        closing.callback(grader.close)
        progress = closing.enter_context(EvaluationProgress(total=total, kept=kept_responses, graded=sum(map(len, grades.values()))))
        grading = closing.enter_context(GradingThread(list(grades.values()), grader, on_progress=progress.graded))
        if kept_responses < total:

            def keep(prompt: Prompt, response: Response) -> None:
                stores[prompt.source].append(response)
                progress.sampled(response.num_tokens)
                grading.check()

            with open_source(plan, announce=announce) as source:
                source.run(_missing(plan, stores), plan.sampling, keep)
        grading.finish()
    return write_report(out, announce=announce)


def rescore(out: Path, *, grader: str | None, timeout_s: float | None, workers: int, announce: Callable[[str], None]) -> dict[str, Any]:
    """Grade the kept responses of a folder again, without any server; None: as before. The old grades stay until the new ones are whole.

    Raises ValueError when the folder holds no evaluation.
    """
    if not (out / SETTINGS_FILE).is_file():  # before the lock, which makes the folder
        raise ValueError(f"--out {out}: holds no evaluation to rescore (no {SETTINGS_FILE})")
    with places.ownership(out):
        kept = read_settings(out)
        assert kept is not None
        grading = GradingSettings(
            grader=kept.grading.grader if grader is None else grader, timeout_s=kept.grading.timeout_s if timeout_s is None else timeout_s
        )
        chosen = make_grader(grading.grader, style=kept.sampling.style, timeout_s=grading.timeout_s, workers=workers)
        try:
            fresh = {name: places.grades_path(out, name).with_suffix(".jsonl.partial") for name in kept.benchmarks}
            total = sum(benchmark.samples * benchmark.num_problems for benchmark in kept.benchmarks.values())
            with EvaluationProgress(total=total, kept=total, graded=0) as progress:
                done = 0
                for name, path in fresh.items():
                    path.unlink(missing_ok=True)
                    problems = load_problems(places.problems_path(out, name))
                    file = GradeFile(problems, responses=places.responses_path(out, name), grades=path)
                    while file.grade_some(chosen):
                        progress.graded(done + len(file))
                    done += len(file)
                    file.close()
            write_atomically(out / places.RESCORING_FILE, "")
            for name, path in fresh.items():
                os.replace(path, places.grades_path(out, name))
            write_settings(out, replace(kept, grading=grading))
            (out / places.RESCORING_FILE).unlink()
        finally:
            chosen.close()
    return write_report(out, announce=announce)


def _grade_file(out: Path, name: str, problems: Sequence[Problem]) -> GradeFile:
    return GradeFile(problems, responses=places.responses_path(out, name), grades=places.grades_path(out, name))


def _note_attempt(out: Path, kept: int, stores: Iterable[ResponseStore], grades: Iterable[GradeFile]) -> None:
    attempts = JsonLines(out / places.ATTEMPTS_FILE)
    attempts.append(
        {
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "responses_kept": kept,
            "torn_responses": sum(store.torn_lines for store in stores),
            "torn_grades": sum(file.torn_lines for file in grades),
        }
    )
    attempts.close()


def _missing(plan: Plan, stores: Mapping[str, ResponseStore]) -> Iterator[tuple[Prompt, int]]:
    """What is not kept yet, samples of a problem one after the other (they share its cache), made when it is asked for."""
    for name, problems in plan.problems.items():
        for problem, token_ids in zip(problems, plan.prompts[name], strict=True):
            prompt = Prompt(
                prompt_id=problem.problem_id,
                text=wrapped(problem, plan.request.style),
                token_ids=token_ids,
                answer=problem.label,
                source=name,
                preceding=problem.preceding,
            )
            for sample in range(plan.chosen[name].samples):
                if (problem.problem_id, sample) not in stores[name]:
                    yield prompt, sample
