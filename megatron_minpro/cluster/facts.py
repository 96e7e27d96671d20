"""What this machine is: what is installed, what will be used, what is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from megatron_minpro.cluster.installation import Installation, Role, broken, differences, examine_all, faults, notes, rows
from parallel.engine_import import EngineImport

Verdict = Literal["ok", "absent", "missing"]

# Distribution, and what the run would lack without it.
REQUIRED = (
    ("torch", "everything"),
    ("megatron-core", "the actor"),
    ("psutil", "checkpoints"),
    ("transformers", "tokenizers and exported policies"),
    ("safetensors", "weights"),
    ("pydantic", "configurations"),
    ("math-verify", "the math_verify reward"),
    ("pyarrow", "parquet prompts"),
    ("datasets", "prompts by dataset name"),
    ("tensorboard", "event files"),
    ("matplotlib", "plots"),
)
_OPTIONAL = (("nvidia-modelopt", "fp8 and nvfp4 export"),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report. missing: a run cannot start without it; absent: something optional."""

    subject: str
    verdict: Verdict
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Examination:
    """What `minpro doctor` says: its findings, and what each role's environment loads."""

    findings: tuple[Finding, ...]
    installations: tuple[Installation, ...]

    @property
    def missing(self) -> list[str]:
        """Subjects without which a run cannot start."""
        return list(dict.fromkeys(finding.subject for finding in self.findings if finding.verdict == "missing"))


def examine() -> Examination:
    """Look at this machine and at the two environments, the trainer's and the servers'. Takes seconds: it imports what it reports."""
    installations, unknown = examine_all()
    findings = [*_machine(), *_packages(), *_capabilities(), *judge(installations, unknown), *_tools()]
    return Examination(findings=tuple(findings), installations=tuple(installations))


def _machine() -> list[Finding]:
    python = f"{platform.python_version()} ({sys.executable})"
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    free_gib = shutil.disk_usage(Path.cwd()).free / 2**30
    if sys.version_info[:2] in ((3, 11), (3, 12)):
        interpreter = Finding(subject="python", verdict="ok", detail=python)
    else:
        interpreter = Finding(subject="python", verdict="missing", detail=f"{python}; expected 3.11 or 3.12")
    resources = f"{os.cpu_count()} cores, {memory_gib:.0f} GiB memory, {free_gib:.0f} GiB free on disk"
    return [interpreter, Finding(subject="machine", verdict="ok", detail=resources)]


def _packages() -> list[Finding]:
    return [
        *(_package(distribution, purpose, otherwise="missing") for distribution, purpose in REQUIRED),
        *(_package(distribution, purpose, otherwise="absent") for distribution, purpose in _OPTIONAL),
    ]


def _package(distribution: str, purpose: str, *, otherwise: Verdict) -> Finding:
    version = distribution_version(distribution)
    if version is None:
        return Finding(subject=distribution, verdict=otherwise, detail=f"needed for {purpose}")
    return Finding(subject=distribution, verdict="ok", detail=version)


def _capabilities() -> list[Finding]:
    if distribution_version("torch") is None:
        return []
    from parallel.capabilities import detect
    from parallel.hidden_packages import hide_unusable

    capabilities = detect()
    return [
        _transformer_engine(capabilities.transformer_engine),
        *(Finding(subject="trainer", verdict="ok", detail=line) for line in capabilities.lines()),
        *(Finding(subject="trainer", verdict="absent", detail=line) for line in hide_unusable()),
    ]


def _transformer_engine(found: EngineImport) -> Finding:
    detail = "needed for fused layers on GPUs" if found.version is None else found.version if found.error is None else found.describe()
    return Finding(subject="transformer-engine", verdict="ok" if found.usable_version else "absent", detail=detail)


def judge(installations: Sequence[Installation], unknown: Mapping[Role, str]) -> list[Finding]:
    """What follows from the roles' environments. Where there is no GPU, what only GPUs need stops nothing.

    Args:
        installations: of the roles that described themselves.
        unknown: why the others did not.
    """
    findings = [
        Finding(subject="rollout servers" if role == "servers" else role, verdict="missing", detail=reason)
        for role, reason in unknown.items()
    ]
    on_gpus: Verdict = "missing" if any(each.on_gpu_machine for each in installations) else "absent"
    for each in installations:
        findings += [Finding(subject=each.role, verdict="missing", detail=line) for line in broken(each)]
        if each.role == "servers" and each.engine.usable:
            findings.append(Finding(subject="sglang", verdict="ok", detail=f"{each.engine} in {each.environment}"))
        if each.cuda is not None or each.on_gpu_machine:
            findings += [Finding(subject=each.role, verdict=on_gpus, detail=line) for line in faults(each)]
        findings += [Finding(subject=each.role, verdict="absent", detail=line) for line in notes(each)]
    if len(installations) == 2:
        findings += [Finding(subject="weight sync", verdict=on_gpus, detail=line) for line in differences(*installations)]
    return findings


def server_packages(python: Path) -> dict[str, str]:
    """Versions of the distributions beside a Python, by lower-case name."""
    # Metadata alone: importing sglang takes half a minute.
    site_packages = [str(path) for path in (python.parent.parent / "lib").glob("python3.*/site-packages")]
    return {
        distribution.metadata["Name"].lower(): distribution.version for distribution in importlib.metadata.distributions(path=site_packages)
    }


def _tools() -> list[Finding]:
    found = shutil.which("sbatch")
    detail = found if found is not None else "no sbatch: jobs can be started on this machine only"
    return [Finding(subject="slurm", verdict="ok" if found else "absent", detail=detail)]


def distribution_version(distribution: str) -> str | None:
    """Of this environment; None when it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def as_table(findings: Sequence[Finding]) -> Table:
    """For people."""
    colours = {"ok": "green", "absent": "dim", "missing": "red"}
    table = Table(box=None, pad_edge=False, show_header=False)
    for finding in findings:
        table.add_row(finding.subject, f"[{colours[finding.verdict]}]{finding.verdict}[/]", Text(finding.detail))
    return table


def side_by_side(installations: Sequence[Installation]) -> Table:
    """The roles' environments, for people."""
    table = Table(box=None, pad_edge=False)
    for title in ("", *(each.role for each in installations)):
        table.add_column(title, justify="left", overflow="fold")
    for row in rows(installations):
        table.add_row(*map(Text, row))
    return table


def as_json(found: Examination) -> dict[str, Any]:
    """For programs."""
    return {
        "can_train": not found.missing,
        "findings": [asdict(finding) for finding in found.findings],
        "installations": {each.role: each.as_json() for each in found.installations},
    }
