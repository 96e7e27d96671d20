"""`minpro evaluate`: the command line of megatron_minpro.evaluation."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_minpro.commands.parameters import AsJson, takes
from megatron_minpro.evaluation.request import EvaluationRequest
from megatron_minpro.option import Option


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateOptions:
    """An evaluation, or something to be done with finished ones."""

    request: EvaluationRequest = field(default_factory=EvaluationRequest)
    rescore: Annotated[bool, Option("grade the kept responses of --out again, without a server")] = False
    compare: Annotated[
        tuple[Path, Path] | None, Option("paired difference B - A of two evaluation folders, with its interval", metavar="A B")
    ] = None
    dry_run: Annotated[bool, Option("check everything, show what would be sampled, start nothing")] = False
    as_json: AsJson = False

    def say(self, text: str) -> None:
        """A line for people; on stderr where stdout is for programs."""
        typer.echo(text, err=self.as_json)

    def result(self, content: Any) -> None:
        """The result for programs."""
        if self.as_json:
            typer.echo(json.dumps(content, indent=2, ensure_ascii=False))


@takes(EvaluateOptions)
def evaluate(options: EvaluateOptions) -> None:
    """Measure pass@k of a checkpoint on mathematical benchmarks; every response is kept, and an interrupted evaluation continues.

    \b
    Example:
      minpro evaluate runs/tiny_moe_cpu/policy --benchmarks aime24,math500 --data data --out runs/evaluation
      minpro evaluate MODEL --benchmarks my_problems.jsonl --out runs/mine --samples 8 --endpoint http://127.0.0.1:8000 --api completions
      minpro evaluate --rescore --out runs/evaluation --grading-timeout 20
      minpro evaluate --compare runs/evaluation_a runs/evaluation_b
    """
    if options.compare is not None:
        _compare(options, *options.compare)
    elif options.rescore:
        _rescore(options)
    else:
        _evaluate(options)


def _compare(options: EvaluateOptions, first: Path, second: Path) -> None:
    if options.rescore or options.request.checkpoint is not None or options.request.chosen.benchmarks:
        raise ValueError("--compare reads two finished evaluations; leave CHECKPOINT, --benchmarks and --rescore out")
    from rich.console import Console

    from megatron_minpro.evaluation.compare import compare_folders

    with Console(stderr=True).status("comparing"):
        found = compare_folders(first, second, announce=options.say)
    options.say(found.markdown)
    options.result(found.rows)


def _rescore(options: EvaluateOptions) -> None:
    request = options.request
    if request.out is None:
        raise ValueError("--rescore needs --out, the folder with the kept responses")
    if request.checkpoint is not None or request.chosen.benchmarks:
        raise ValueError("--rescore grades all that --out holds; leave CHECKPOINT and --benchmarks out")
    from megatron_minpro.evaluation import run

    graded = run.rescore(
        request.out, grader=request.grader, timeout_s=request.grading_timeout, workers=request.grading_workers, announce=options.say
    )
    options.result(graded)


def _evaluate(options: EvaluateOptions) -> None:
    request = options.request
    if request.checkpoint is None:
        raise ValueError("CHECKPOINT is missing")
    if request.out is None and not options.dry_run:
        raise ValueError("--out is missing, the folder for responses, grades and tables")
    from rich.console import Console

    from megatron_minpro.evaluation import plan, run

    with Console(stderr=True).status("reading checkpoint and problems"):
        planned = plan.plan(request)
    for name, chosen in planned.chosen.items():
        options.say(f"{chosen.title} ({name}): {chosen.num_problems:,} problems x {chosen.samples} samples")
    sampling = f"temperature {request.temperature:g}, top-p {request.top_p:g}, style {request.style}"
    options.say(f"{planned.num_responses:,} responses of up to {request.max_new_tokens:,} tokens, {sampling}")
    if options.dry_run:
        options.result(asdict(planned.settings))
        return
    options.result(run.evaluate(planned, announce=options.say))
