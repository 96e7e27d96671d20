"""What one study varies: expert parallelism, the number of ranks, and with them the work; everything else stays as configured."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from checkpoints_convert.atomic_files import write_atomically
from megatron_minpro.config import RunConfig, dump_config, flatten_differences, load_config
from parallel.layout import ParallelLayout
from parallel.planner.shape import ModelShape
from parallel.planner.stages import check_layout

Scaling = Literal["strong", "weak"]
Routing = Literal["real", "forced"]
SCALINGS: tuple[Scaling, ...] = ("strong", "weak")

CONFIG_FILE = "config.yaml"
SETTINGS_FILE = "study.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a folder's rows have in common beside the configuration.

    routing: "real", as the model's routers decide, or "forced", Megatron-Core's random and so balanced choice.
    mean_tokens: of a sequence, prompt included; all are as long. warm_up and steps: optimizer steps before and in the measured window.
    hardware: whose peak MFU speaks of, and what predictions are for. imbalance: of the predictions.
    """

    routing: Routing
    mean_tokens: int
    warm_up: int
    steps: int
    hardware: str
    imbalance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One layout with its work. problem: why it cannot be run, None when it can; without a layout there is always one."""

    ep: int
    world_size: int
    sequences: int  # of one optimizer step, over all ranks
    scalings: tuple[Scaling, ...]  # the series it belongs to
    layout: ParallelLayout | None
    problem: str | None

    @property
    def key(self) -> str:
        """Names the case within a study, and its files."""
        return f"ranks{self.world_size}_ep{self.ep}_sequences{self.sequences}"


def make_cases(
    base: ParallelLayout,
    shape: ModelShape,
    *,
    ep_sizes: Sequence[int],
    world_sizes: Sequence[int],
    scalings: Sequence[Scaling],
    sequences: int,
) -> list[Case]:
    """Every ep with every number of ranks, smallest first.

    base: gives the other axes. world_sizes: empty means for each ep the fewest ranks that hold it. sequences: of one step; strong scaling
    keeps them, weak scaling keeps sequences per rank as they are on the fewest ranks. A case of both series is one case.
    """
    pairs = [
        (ep, world_size)
        for ep in sorted(set(ep_sizes))
        for world_size in sorted(set(world_sizes)) or [math.lcm(base.tp * base.pp * base.cp, ep * base.etp * base.pp)]
    ]
    fewest = min(world_size for _, world_size in pairs)
    series: dict[tuple[int, int, int], list[Scaling]] = {}
    for scaling in scalings:
        for ep, world_size in pairs:
            work = sequences if scaling == "strong" else -(-sequences * world_size // fewest)
            series.setdefault((world_size, ep, work), []).append(scaling)
    return [_make_case(base, shape, *what, tuple(found)) for what, found in sorted(series.items())]


def _make_case(base: ParallelLayout, shape: ModelShape, world_size: int, ep: int, sequences: int, scalings: tuple[Scaling, ...]) -> Case:
    layout, problem = None, None
    try:
        layout = replace(base, world_size=world_size, ep=ep)
        check_layout(shape, layout)
    except ValueError as error:
        problem = str(error)
    if layout is not None and problem is None and sequences < layout.dp:
        problem = f"{sequences} sequences leave some of {layout.dp} replicas without one"
    return Case(ep=ep, world_size=world_size, sequences=sequences, scalings=scalings, layout=layout, problem=problem)


def open_study(folder: Path, config: RunConfig, settings: Settings) -> None:
    """Make the study's folder, or take up one of the same configuration and settings.

    Raises ValueError naming what differs from the study that the folder holds.
    """
    path = folder / SETTINGS_FILE
    if path.exists():
        there = json.loads(path.read_text(encoding="utf-8"))
        here: dict[str, Any] = asdict(settings)
        names = [field.name for field in fields(Settings)]
        different = {name: (there.get(name), here[name]) for name in names if there.get(name) != here[name]}
        different |= flatten_differences(load_config(folder / CONFIG_FILE), config)
        if different:
            shown = "; ".join(f"{key}: {a!r} there, {b!r} here" for key, (a, b) in list(different.items())[:3])
            raise ValueError(f"--out: {folder} holds another study ({shown}); expected another folder")
        return
    (folder / "rows").mkdir(parents=True, exist_ok=True)
    write_atomically(folder / CONFIG_FILE, dump_config(config))
    write_atomically(path, json.dumps(asdict(settings), indent=2) + "\n")


def read_study(folder: Path) -> tuple[RunConfig, Settings]:
    """What open_study wrote."""
    values = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    return load_config(folder / CONFIG_FILE), Settings(**values)
