"""`minpro compare`: the command line of megatron_minpro.report.comparison."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from megatron_minpro.commands.parameters import AsJson, takes
from megatron_minpro.option import Option


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareOptions:
    """What `minpro compare` is asked for."""

    runs: Annotated[tuple[Path, ...], Option("folders of runs, of any state", argument=True, metavar="RUN...")]
    reference: Annotated[
        Path | None, Option("run whose group the others are compared with, one of them or a further one; default: the first", metavar="RUN")
    ] = None
    as_json: AsJson = False


@takes(CompareOptions)
def compare(options: CompareOptions) -> None:
    """Print runs beside each other: settings that differ, measures, means over seeds, and differences from a reference paired by seed.

    Runs whose settings differ in the seed alone are one group. Intervals are 95 % t intervals; p is of the paired t test, not corrected
    for the number of tests. megatron_minpro/report/measures.py defines the measures. Of pass@k the smallest and the largest k are shown;
    --json has all.

    \b
    Example:
      minpro compare runs/grpo runs/minpro
      minpro compare runs/studies/mine/cells/*/ --reference runs/studies/mine/cells/grpo_staleness8_seed1
    """
    from megatron_minpro.report import comparison, comparison_text
    from megatron_minpro.report.runs import read_run

    views = [read_run(path) for path in options.runs]
    reference = None
    if options.reference is not None:
        given = [view for view in views if view.path.resolve() == options.reference.resolve()]
        reference = given[0] if given else read_run(options.reference)
        views = views if given else [reference, *views]
    found = comparison.compare(views, reference)
    if options.as_json:
        typer.echo(json.dumps(comparison_text.comparison_record(found), indent=2, allow_nan=False))
    else:
        comparison_text.print_comparison(found, comparison_text.make_console(sys.stdout))
