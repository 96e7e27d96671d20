"""What this machine is: what is installed, what will be used, what is missing; and what each node of a job reports of itself."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from megatron_minpro.config import RunConfig
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


def examine() -> list[Finding]:
    """Look at this machine and at the two environments, the trainer's and the servers'."""
    return [*_machine(), *_packages(), *_capabilities(), *_server_environment(), *_tools()]


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

    capabilities = detect()
    return [_transformer_engine(capabilities.transformer_engine), *(_trainer(line) for line in capabilities.lines())]


def _trainer(line: str) -> Finding:
    return Finding(subject="trainer", verdict="ok", detail=line)


def _transformer_engine(found: EngineImport) -> Finding:
    if found.version is None:
        detail = "needed for fused layers on GPUs"
    elif found.error is not None:
        detail = f"{found.version} does not import ({found.error}); the local layers are used. Rebuild it for this torch, or remove it"
    else:
        detail = found.version
    return Finding(subject="transformer-engine", verdict="ok" if found.usable_version else "absent", detail=detail)


def _server_environment() -> list[Finding]:
    from rollout.sglang.environment import default_server_python

    try:
        python = default_server_python()
    except ValueError as error:
        return [Finding(subject="rollout servers", verdict="missing", detail=str(error))]
    found, environment = server_packages(python), python.parent.parent
    if "sglang" not in found:
        return [Finding(subject="sglang", verdict="missing", detail=f"not in {environment}: make setup installs it")]
    return [Finding(subject="sglang", verdict="ok", detail=f"{found['sglang']} in {environment}")]


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


def can_train(findings: Sequence[Finding]) -> bool:
    """Whether nothing is missing."""
    return all(finding.verdict != "missing" for finding in findings)


def as_table(findings: Sequence[Finding]) -> Table:
    """For people."""
    colours = {"ok": "green", "absent": "dim", "missing": "red"}
    table = Table(box=None, pad_edge=False, show_header=False)
    for finding in findings:
        table.add_row(finding.subject, f"[{colours[finding.verdict]}]{finding.verdict}[/]", finding.detail)
    return table


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """For programs."""
    return {"can_train": can_train(findings), "findings": [asdict(finding) for finding in findings]}


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReport:
    """One node's facts. clock_s: seconds since the epoch when it was made. missing: what the run needs and this node lacks."""

    node: str
    gpus: int
    gpu_memory_gib: float
    free_gib: float  # where the run folder lies
    clock_s: float
    versions: Mapping[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> NodeReport:
        values = json.loads(text)
        return cls(**{**values, "missing": tuple(values["missing"])})


def describe_node(config: RunConfig, *, node: str, serves: bool, missing: Sequence[str]) -> NodeReport:
    """This machine as the run of `config` sees it.

    Args:
        config: the run.
        node: this machine's name in the job.
        serves: it will run rollout servers and must have their environment.
        missing: what the run needs and this machine lacks, as checks.missing_paths says it.
    """
    import torch

    from rollout.sglang.environment import default_server_python

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    memory = [torch.cuda.get_device_properties(index).total_memory for index in range(gpus)]
    versions = {"python": platform.python_version()}
    versions |= {name: distribution_version(name) or "absent" for name, _ in REQUIRED}
    absent = list(missing)
    if serves:
        try:
            versions["sglang"] = server_packages(default_server_python()).get("sglang", "absent")
        except ValueError as error:
            absent.append(str(error))
    return NodeReport(
        node=node,
        gpus=gpus,
        gpu_memory_gib=min(memory, default=0) / 2**30,
        free_gib=shutil.disk_usage(config.run_dir).free / 2**30 if config.run_dir.exists() else 0.0,
        clock_s=time.time(),
        versions=versions,
        missing=tuple(absent),
    )
