"""What an evaluation folder's responses and grades depend on. Kept in the folder, so that different settings are never mixed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from checkpoints_convert.atomic_files import write_atomically

SETTINGS_FILE = "settings.json"
_WEIGHT_SUFFIXES = (".safetensors", ".distcp", ".metadata", ".bin", ".pt")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSettings:
    """What a response depends on, its problem aside."""

    checkpoint: str
    weights: str  # names, sizes and times of the weight files, as a hash; "served" where only the server has them
    api: str  # native and completions send the same tokens; chat uses the server's template
    style: str  # the wrapper around the question, which also says where the answer is looked for
    temperature: float
    top_p: float
    max_new_tokens: int
    end_token_ids: str  # ids of the tokens that end a response, "151643 151645"; "served" where only the server knows them
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GradingSettings:
    """What a grade depends on, its response aside."""

    grader: str
    timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkSettings:
    """Which problems, and how often each is sampled."""

    title: str
    samples: int
    num_problems: int
    problems: str  # a hash of questions, labels and tolerances
    prompts: str  # a hash of what is sent: wrapper, chat template and tokenizer have their part in it


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSettings:
    """All of it."""

    sampling: SamplingSettings
    grading: GradingSettings
    benchmarks: Mapping[str, BenchmarkSettings]


def read_settings(folder: Path) -> EvaluationSettings | None:
    """What the folder holds; None when it holds no evaluation. Raises ValueError for a file that is not one of ours."""
    path = folder / SETTINGS_FILE
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return EvaluationSettings(
            sampling=SamplingSettings(**content["sampling"]),
            grading=GradingSettings(**content["grading"]),
            benchmarks={name: BenchmarkSettings(**fields) for name, fields in content["benchmarks"].items()},
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not the settings of an evaluation: {error}") from error


def write_settings(folder: Path, settings: EvaluationSettings) -> None:
    write_atomically(folder / SETTINGS_FILE, json.dumps(asdict(settings), indent=2) + "\n")


def merged(kept: EvaluationSettings, wanted: EvaluationSettings, *, folder: Path) -> EvaluationSettings:
    """The kept settings with the wanted benchmarks added or sampled further.

    Raises ValueError naming every difference that would mix unlike responses or grades; more samples per problem are no difference.
    """
    differences = [*_differing("", kept.sampling, wanted.sampling), *_differing("", kept.grading, wanted.grading)]
    for name, now in wanted.benchmarks.items():
        if name in kept.benchmarks:
            before = kept.benchmarks[name]
            differences += [text for text in _differing(f"{name}: ", before, now) if not text.startswith(f"{name}: samples")]
            if now.samples < before.samples:
                differences.append(f"{name}: samples: {before.samples} there, {now.samples} here")
    if differences:
        raise ValueError(f"--out {folder}: holds an evaluation with other settings: {'; '.join(differences)}")
    return EvaluationSettings(sampling=kept.sampling, grading=kept.grading, benchmarks={**kept.benchmarks, **wanted.benchmarks})


def digest(content: Any) -> str:
    """A short hash of anything that JSON can say."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def weights_digest(checkpoint: Path) -> str:
    """A short hash of names, sizes and modification times of the weight files: cheap, and another export to the same place is noticed."""
    files = sorted(path for path in checkpoint.iterdir() if path.is_file() and path.name.endswith(_WEIGHT_SUFFIXES))
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return digest(facts)


def _differing(prefix: str, kept: Any, wanted: Any) -> Iterator[str]:
    before, now = asdict(kept), asdict(wanted)
    for name in before:
        if before[name] != now[name]:
            yield f"{prefix}{name}: {before[name]!r} there, {now[name]!r} here"
