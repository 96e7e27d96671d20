"""What each machine of a job tells about itself before anything expensive starts, and what is wrong when that is laid side by side."""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from megatron_minpro.cluster.doctor import REQUIRED, distribution_version, server_packages
from megatron_minpro.config import RunConfig
from rollout.sglang.server import default_server_python

MAX_CLOCK_DIFFERENCE_S = 5.0
MIN_FREE_GIB = 1.0


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


def describe_node(config: RunConfig, *, node: str, serves: bool) -> NodeReport:
    """This machine as the run of `config` sees it. serves: it will run rollout servers and must have their environment."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    memory = [torch.cuda.get_device_properties(index).total_memory for index in range(gpus)]
    versions = {"python": platform.python_version()}
    versions |= {name: distribution_version(name) or "absent" for name, _ in REQUIRED}
    missing = missing_paths(config)
    if serves:
        try:
            versions["sglang"] = server_packages(default_server_python()).get("sglang", "absent")
        except ValueError as error:
            missing.append(str(error))
    return NodeReport(
        node=node,
        gpus=gpus,
        gpu_memory_gib=min(memory, default=0) / 2**30,
        free_gib=shutil.disk_usage(config.run_dir).free / 2**30 if config.run_dir.exists() else 0.0,
        clock_s=time.time(),
        versions=versions,
        missing=tuple(missing),
    )


def missing_paths(config: RunConfig) -> list[str]:
    """`key: path` for every file or folder that the run needs and this machine does not have, or may not write to."""
    needed = [("model.path", config.model.path, config.model.warm_up is None)]
    needed += [
        (f"{section}.source", prompts.source, prompts.source.endswith((".jsonl", ".json", ".parquet")))
        for section, prompts in (("prompts", config.prompts), ("evaluation.prompts", config.evaluation.prompts))
    ]
    keys = (("rollout.api_key_path", config.rollout.api_key_path), ("rollout.admin_key_path", config.rollout.admin_key_path))
    needed += [(name, path, True) for name, path in keys if path is not None]
    absent = [f"{name}: {path} does not exist" for name, path, required in needed if required and not Path(path).exists()]
    existing = next(folder for folder in (config.run_dir, *config.run_dir.absolute().parents) if folder.exists())
    if not os.access(existing, os.W_OK):
        absent.append(f"output_dir: {config.run_dir} cannot be written to")
    return absent


def problems(
    reports: Mapping[str, NodeReport | None], *, gpus_per_node: int, arrival_s: Mapping[str, float], roles: Mapping[str, str]
) -> dict[str, list[str]]:
    """What is wrong with each node; empty when nothing is.

    reports: by node, None for one that sent none in time. gpus_per_node: what each must have; 0 on machines without. arrival_s: when each
    report arrived, on one clock. roles: "trainer" or "server"; versions are compared among the nodes of a role, against what most have.
    """
    found: dict[str, list[str]] = {node: [] for node in reports}
    skews = {node: report.clock_s - arrival_s[node] for node, report in reports.items() if report is not None}
    usual_clock = statistics.median(skews.values()) if skews else 0.0
    for node, report in reports.items():
        if report is None:
            found[node].append("sent no report: unreachable, or its Python did not start (see its log)")
            continue
        found[node] += report.missing
        if report.gpus != gpus_per_node:
            found[node].append(f"{report.gpus} GPUs, expected {gpus_per_node}")
        if report.free_gib < MIN_FREE_GIB:
            found[node].append(f"{report.free_gib:.2f} GiB free for the run folder, expected at least {MIN_FREE_GIB:g}")
        if abs(skews[node] - usual_clock) > MAX_CLOCK_DIFFERENCE_S:
            found[node].append(f"its clock is {skews[node] - usual_clock:+.0f} s off the others'")
        present = [other for other in reports.values() if other is not None and roles[other.node] == roles[node]]
        found[node] += _odd_versions(report, present)
    return {node: lines for node, lines in found.items() if lines}


def _odd_versions(report: NodeReport, others: Sequence[NodeReport]) -> list[str]:
    lines = []
    for name, version in report.versions.items():
        counts = Counter(other.versions.get(name, "absent") for other in others)
        most = max(counts.values())
        usual = [value for value, count in counts.items() if count == most]
        if usual != [version]:  # a tie makes both suspicious
            rivals = ", ".join(value for value in usual if value != version)
            lines.append(f"{name} {version}, {'most nodes have' if most > 1 else 'another node has'} {rivals}")
    return lines
