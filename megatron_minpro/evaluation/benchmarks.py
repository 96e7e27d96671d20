"""The benchmarks as declared data: where they lie, which fields hold question and answer, how often each problem is sampled."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_minpro.data.rows import is_file, is_source_of_rows, source_name
from megatron_minpro.data.sources import ANSWER_FORMATS, PRESETS
from megatron_minpro.evaluation.request import BenchmarkChoice
from megatron_minpro.registry import nearest

_MANY, _FEW = 128, 2  # samples per problem of small and of large sets, as the paper (arXiv:2601.22718)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hub:
    """A data set at the Hugging Face hub with the same fields as the file."""

    dataset: str  # owner/name
    split: str
    name: str | None = None  # of the data set's configuration


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """One set of problems and how it is read and graded.

    relative_tolerance: how far a numerical answer may lie from the label, as a part of the label. tolerance_field: a field with the
    absolute tolerance of that row. label_corrections: labels that no grader could use as they are stored -> what they mean.
    """

    name: str
    title: str
    question_field: str
    answer_field: str
    answer_format: str = "plain"
    num_samples: int
    source: str | None = None  # a file or a data set of the user's own; None: one of the seven, looked for by name
    split: str | None = None  # of a Hugging Face data set named by `source`
    hub: Hub | None = None
    relative_tolerance: float = 0.0
    tolerance_field: str | None = None
    label_corrections: Mapping[str, str] = field(default_factory=dict)


def _known(name: str, title: str, num_samples: int, **fields: Any) -> Benchmark:
    """A well-known set, laid out as the preset of the same name says."""
    layout = PRESETS[name]
    return Benchmark(
        name=name,
        title=title,
        question_field=layout.question_field,
        answer_field=layout.answer_field,
        answer_format=layout.answer_format,
        num_samples=num_samples,
        **fields,
    )


BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        _known("amc23", "AMC23", _MANY),
        _known("aime24", "AIME24", _MANY, hub=Hub(dataset="HuggingFaceH4/aime_2024", split="train")),
        _known("aime25", "AIME25", _MANY, hub=Hub(dataset="math-ai/aime25", split="test")),
        _known("math500", "MATH500", _FEW, hub=Hub(dataset="HuggingFaceH4/MATH-500", split="test")),
        _known(
            "olympiadbench",
            "OlympiadBench",
            _FEW,
            tolerance_field="error",
            label_corrections={
                "$\\angle B E A_{1}=90$,$\\angle A E B_{1}=90$": "90",
                "$t(0,4]$": "(0,4]",
                "$f(x)=a x+b$, where $b$ is an arbitrary integer, and $a$ is an arbitrary positive integer with $\\mho(a)=0$": "f(x)=a x+b",
            },
        ),
        # Worked physics: constants and rounding differ, so numbers within 1% count.
        _known(
            "minerva_math",
            "Minerva",
            _FEW,
            relative_tolerance=0.01,
            label_corrections={
                "np.arcsin(10/13)": "\\arcsin(10/13)",
                "-1./3": "-1/3",
                "-3./2": "-3/2",
                "\\frac{1}{\\sqrt{2}}c": "\\frac{c}{\\sqrt{2}}",  # a c behind a fraction is taken for cents
            },
        ),
        _known("gsm8k", "GSM8K", _FEW, hub=Hub(dataset="openai/gsm8k", split="test", name="main")),
    )
}
_ALIASES = {"minerva": "minerva_math", "olympiad": "olympiadbench", "math-500": "math500"}


def choose_benchmarks(choice: BenchmarkChoice) -> list[Benchmark]:
    """The named benchmarks, in order. A name is one of the seven, a .jsonl, .jsonl.gz, .json or .parquet file, or a data set.

    Raises ValueError for an unknown name, a name given twice and an unknown answer format.
    """
    if choice.answer_format not in ANSWER_FORMATS:
        raise ValueError(f"--answer-format {choice.answer_format}: unknown; {nearest(choice.answer_format, ANSWER_FORMATS)}")
    chosen: list[Benchmark] = []
    for given in choice.benchmarks:
        known = BENCHMARKS.get(_ALIASES.get(given.lower(), given.lower()))
        if known is None:
            if not is_source_of_rows(given):
                raise ValueError(
                    f"--benchmarks: {given!r} is unknown; {nearest(given, BENCHMARKS)}; "
                    "or a .jsonl, .jsonl.gz, .json or .parquet file, or owner/name of a data set"
                )
            known = Benchmark(
                name=_file_name(given),
                title=_file_name(given),
                question_field=choice.question_field,
                answer_field=choice.answer_field,
                answer_format=choice.answer_format,
                num_samples=_FEW,
                source=given,
                split=choice.split,
            )
        if known.name in {benchmark.name for benchmark in chosen}:
            raise ValueError(f"--benchmarks: {known.name} is named twice")
        chosen.append(known)
    if not chosen:
        raise ValueError("--benchmarks: nothing is named")
    return chosen


def locate(benchmark: Benchmark, data: Path | None) -> tuple[str, dict[str, str]]:
    """Source and options for read_rows.

    data: a folder with NAME/test.jsonl, data/eval/NAME/test.jsonl or NAME.jsonl; None: the Hugging Face hub, for sets that it has in the
    declared layout. Raises ValueError naming what was looked for.
    """
    if benchmark.source is not None:
        if is_file(benchmark.source):
            return benchmark.source, {}
        return benchmark.source, {"split": "test" if benchmark.split is None else benchmark.split}
    if data is not None:
        places = [
            data / benchmark.name / "test.jsonl",
            data / "data/eval" / benchmark.name / "test.jsonl",
            data / f"{benchmark.name}.jsonl",
        ]
        for place in places:
            if place.is_file():
                return str(place), {}
        raise ValueError(f"--data {data}: no {benchmark.name}; looked for {', '.join(str(place.relative_to(data)) for place in places)}")
    if benchmark.hub is None:
        raise ValueError(f"{benchmark.name}: --data DIR (or MINPRO_ASSETS) is needed; it names a folder with {benchmark.name}/test.jsonl")
    named = {} if benchmark.hub.name is None else {"name": benchmark.hub.name}
    return benchmark.hub.dataset, {"split": benchmark.hub.split, **named}


def _file_name(given: str) -> str:
    """A name for files and tables: of a path its stem, of a data set both parts."""
    return re.sub(r"[^\w.-]", "_", source_name(given))
