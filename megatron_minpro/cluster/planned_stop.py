"""How long a stop of a planned run takes, and what the job script must allow it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from parallel.planner.memory import GB
from parallel.planner.plan import Plan

# Of slurm/qwen3_30b_a3b.sbatch: STOP_WITHIN, and the @ of --signal.
SCRIPT_STOP_WITHIN_S, SCRIPT_SIGNAL_S = 1500, 1800
_OPTIMIZER_BYTES = 12  # a parameter in fp32 and its two moments
_FILE_SYSTEM_GBS = 1.0  # what all ranks together write: a slow one


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStop:
    """Nobody looks for a stop inside a piece; a checkpoint follows."""

    piece: str
    piece_s: float
    checkpoint_bytes: float

    @property
    def seconds(self) -> int:
        """Whole minutes, upwards."""
        return 60 * math.ceil((self.piece_s + self.checkpoint_s) / 60)

    @property
    def checkpoint_s(self) -> float:
        """Of writing it."""
        return self.checkpoint_bytes / (1e9 * _FILE_SYSTEM_GBS)

    @property
    def variables(self) -> tuple[str, ...]:
        """What to put before sbatch; nothing where the script's own values are enough."""
        return (f"STOP_WITHIN={self.seconds}",) if self.seconds > SCRIPT_STOP_WITHIN_S else ()

    @property
    def options(self) -> tuple[str, ...]:
        """What to put behind sbatch."""
        margin_s = SCRIPT_SIGNAL_S - SCRIPT_STOP_WITHIN_S
        return (f"--signal=B:USR1@{self.seconds + margin_s}",) if self.variables else ()

    def line(self) -> str:
        """For people."""
        enough = "raised in the command above" if self.variables else f"the script's STOP_WITHIN is {SCRIPT_STOP_WITHIN_S} s"
        return (
            f"a stop takes up to {self.seconds} s: {self.piece} {self.piece_s:.0f} s, a checkpoint of {self.checkpoint_bytes / GB:.0f} GB "
            f"{self.checkpoint_s:.0f} s at {_FILE_SYSTEM_GBS:g} GB/s; {enough}"
        )


def planned_stop(plan: Plan) -> PlannedStop:
    """Of a plan of reinforcement learning. The checkpoint holds the weights that sample a missing batch too."""
    step = plan.global_step
    assert step is not None
    pieces = {"a mini-batch": plan.time.step_s, "the scoring of a batch": step.logprobs_s, "a weight sync": step.sync_s}
    piece = max(pieces, key=lambda name: pieces[name])
    weight_bytes = 4 if plan.training.precision == "fp32" else 2
    kept_bytes = 0 if step.schedule == "serial" else weight_bytes
    size = plan.shape.total_parameters * (weight_bytes + _OPTIMIZER_BYTES + kept_bytes)
    return PlannedStop(piece=piece, piece_s=pieces[piece], checkpoint_bytes=size)
