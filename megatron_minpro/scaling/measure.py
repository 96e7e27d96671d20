"""Starts, watches and ends one process group per measured case. Every case gives a row, a failed one too."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_minpro.config import RunConfig
from megatron_minpro.run import base_model
from megatron_minpro.run.ranks import Rendezvous, start_ranks
from megatron_minpro.scaling.rows import Row, measured
from megatron_minpro.scaling.study import Case
from parallel.capabilities import Capabilities
from parallel.cuda_environment import cuda_environment
from parallel.layout import ParallelLayout
from parallel.planner.hardware import Hardware
from parallel.planner.shape import ModelShape
from rollout.processes import ManagedProcess


@dataclass(frozen=True, slots=True, kw_only=True)
class Nodes:
    """The machines that a case may use, of which this is one. gpus: of each; on a CPU any number of ranks."""

    count: int
    rank: int
    gpus: int | None
    address: str
    port: int


def nodes_needed(world_size: int, nodes: Nodes) -> int:
    """Machines that so many ranks fill. Raises ValueError when there are too few, or ranks cannot be shared evenly."""
    if nodes.gpus is None:
        needed = min(nodes.count, world_size)
    else:
        needed = -(-world_size // nodes.gpus)
        if needed > nodes.count:
            raise ValueError(f"{world_size} ranks need {needed} machines of {nodes.gpus} GPUs, there are {nodes.count}")
    if world_size % needed:
        raise ValueError(f"{world_size} ranks cannot be shared evenly by {needed} machines")
    return needed


def model_folder(config: RunConfig, folder: Path) -> Path:
    """The model to measure with: model.path, or random weights of the recipe it would be made by, made in the study's folder.

    Raises ValueError when there is neither.
    """
    path = Path(config.model.path)
    if path.exists():
        return path
    if config.model.warm_up is None:
        raise ValueError(f"model.path: {path} does not exist and model.warm_up is null; expected a Hugging Face model folder")
    made = folder / "random_model"
    if not made.exists():
        base_model.write_initial_model(config.model, config.prompts, made)
    return made


def measure_case(
    row: Row,
    case: Case,
    folder: Path,
    model: Path,
    nodes: Nodes,
    *,
    shape: ModelShape,
    hardware: Hardware,
    capabilities: Capabilities,
    timeout_s: float,
) -> Row | None:
    """Run a legal case and fill its row; a failure fills in its reason. None on machines but the first, and on those left idle."""
    try:
        needed = nodes_needed(case.world_size, nodes)
    except ValueError as error:
        return replace(row, reason=str(error)) if nodes.rank == 0 else None
    if nodes.rank >= needed:
        return None
    assert case.layout is not None
    request = {"task": "measure", "layout": asdict(case.layout), "sequences": case.sequences}
    found = run_ranks(case.key, request, folder, model, nodes, needed, timeout_s=timeout_s)
    if nodes.rank != 0:
        return None
    if "step_s" in found:
        return measured(row, found, shape, hardware, capabilities)
    return replace(row, **found)


def run_ranks(
    name: str, request: Mapping[str, Any], folder: Path, model: Path, nodes: Nodes, needed: int, *, timeout_s: float
) -> dict[str, Any]:
    """Start this machine's ranks, wait for their end, and read what rank 0 left; or status and reason of a failure.

    request: what worker.py takes; its layout says how many ranks there are on all `needed` machines.
    """
    result = folder / "results" / f"{name}.json"
    result.parent.mkdir(parents=True, exist_ok=True)  # the first machine may not have made the folder yet
    if nodes.rank == 0:
        result.unlink(missing_ok=True)
    ranks = _start(name, request, folder, model, result, nodes, needed)
    reason = None
    try:
        ranks.wait(timeout_s)
    except subprocess.TimeoutExpired:
        reason = f"no result within {timeout_s:.0f} s (log: {ranks.log_path})"
    finally:
        ranks.terminate()
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
    if found and found.get("status") != "failed":
        return found
    if reason is None and was_killed("\n".join(ranks.last_log_lines(200))):  # what the others say then is a consequence
        reason = f"a rank was killed from outside, as the kernel does when memory runs out (log: {ranks.log_path})"
    if reason is None:
        reason = found.get("reason", f"the ranks ended with exit code {ranks.exit_code} (log: {ranks.log_path})")
    return {"status": "failed", "reason": reason}


def was_killed(log: str) -> bool:
    """Whether torchrun's last words name SIGKILL. They speak of ranks that ended before it ended the others."""
    return "Signal 9 (SIGKILL) received by PID" in log


def _start(name: str, request: Mapping[str, Any], folder: Path, model: Path, result: Path, nodes: Nodes, needed: int) -> ManagedProcess:
    together = Rendezvous(machines=needed, machine=nodes.rank, address=nodes.address, port=nodes.port)
    return start_ranks(
        "megatron_minpro.scaling.measure_rank",
        [str(folder), json.dumps(request), str(model), str(result)],
        count=request["layout"]["world_size"] // needed,
        name=f"ranks of {name}",
        log_path=folder / "logs" / (f"{name}.log" if needed == 1 else f"{name}_node{nodes.rank}.log"),
        loopback=needed == 1,
        rendezvous=None if needed == 1 else together,
        variables=cuda_environment(ParallelLayout(**request["layout"]), deterministic=False),
    )
