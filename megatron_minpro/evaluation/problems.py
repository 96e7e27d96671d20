"""Problems: a question, its label, and how near a number must come."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from checkpoints_convert.atomic_files import write_atomically
from megatron_minpro.batch.prompt import Message
from megatron_minpro.data.rows import read_rows
from megatron_minpro.data.sources import ANSWER_FORMATS, field_text, preceding_messages, read_field
from megatron_minpro.evaluation.benchmarks import Benchmark, locate
from megatron_minpro.rewards.answers import Tolerance


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One row of a benchmark."""

    problem_id: str  # unique within its benchmark; changes when the question does
    question: str
    label: str
    relative_tolerance: float
    absolute_tolerance: float
    preceding: tuple[Message, ...] = ()  # messages of the row that stand before the question, such as a system message

    @property
    def tolerance(self) -> Tolerance:
        return Tolerance(relative=self.relative_tolerance, absolute=self.absolute_tolerance)


def read_problems(benchmark: Benchmark, *, data: Path | None, limit: int | None) -> list[Problem]:
    """All rows, or the first `limit`; every row is a problem, also where two ask the same.

    Raises ValueError naming source, row and field for a missing or empty question or answer, and for an empty source.
    """
    source, options = locate(benchmark, data)
    problems = []
    for number, (where, row) in enumerate(islice(read_rows(source, options, key="--benchmarks"), limit)):
        question = field_text(read_field(row, benchmark.question_field, where=where), benchmark.question_field, where=where)
        stored = field_text(read_field(row, benchmark.answer_field, where=where), benchmark.answer_field, where=where)
        label = ANSWER_FORMATS[benchmark.answer_format](stored)
        for name, text in ((benchmark.question_field, question), (benchmark.answer_field, label)):
            if text is None or not text.strip():
                raise ValueError(f"{where}: field {name!r} holds no {'question' if text is question else 'answer'}: {stored[-60:]!r}")
        assert label is not None
        absolute = 0.0
        if benchmark.tolerance_field is not None:
            given = read_field(row, benchmark.tolerance_field, where=where)
            absolute = 0.0 if given is None else _tolerance(given, where=where, name=benchmark.tolerance_field)
        problems.append(
            Problem(
                problem_id=f"{number:05d}-{hashlib.sha256(question.encode()).hexdigest()[:8]}",
                question=question,
                label=benchmark.label_corrections.get(label.strip(), label.strip()),
                relative_tolerance=benchmark.relative_tolerance,
                absolute_tolerance=absolute,
                preceding=preceding_messages(row, benchmark.question_field, where=where),
            )
        )
    if not problems:
        raise ValueError(f"{source}: holds no problem")
    return problems


def write_problems(path: Path, problems: Sequence[Problem]) -> None:
    """One JSON line per problem."""
    write_atomically(path, "".join(json.dumps(asdict(problem), ensure_ascii=False) + "\n" for problem in problems))


def load_problems(path: Path) -> list[Problem]:
    """What write_problems wrote. Raises ValueError naming file and line."""
    problems = []
    with path.open("rb") as file:  # by line feeds alone: a question may contain U+2028 and other ends of lines
        for number, line in enumerate(file, start=1):
            try:
                fields = json.loads(line)
                problems.append(Problem(**{**fields, "preceding": tuple(fields.get("preceding", ()))}))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}: line {number} is not a problem: {error}") from error
    return problems


def _tolerance(given: object, *, where: str, name: str) -> float:
    try:
        value = float(str(given))
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ValueError(f"{where}: field {name!r} is {given!r}, expected a tolerance of at least 0")
    return value
