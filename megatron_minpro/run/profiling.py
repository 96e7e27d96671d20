"""profile.steps=3-5: a torch profiler trace of these global steps per rank, and the planner's prediction beside what was measured."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from checkpoints_convert.atomic_files import write_atomically
from megatron_minpro.cluster import planning
from megatron_minpro.cluster.training_choice import TrainingChoice
from megatron_minpro.config import RunConfig
from megatron_minpro.evaluation.tables import markdown_table
from parallel.capabilities import detect
from parallel.planner.hardware import hardware_of_device, read_hardware
from parallel.planner.plan import make_plan

FOLDER = "profile"
PHASES_FILE = "phases.md"
_PHASES = ("sample", "reward", "score", "update", "sync")


class StepProfiler:
    """Traces global steps first to last of one rank. Call `at_step` when a step begins, `close` after the last one.

    The trace, RUN/profile/steps_3-5_rank_0.pt.trace.json.gz, opens in TensorBoard's profiler and in Perfetto. steps None traces nothing.
    """

    def __init__(self, run_dir: Path, *, steps: tuple[int, int] | None, rank: int) -> None:
        self._steps = steps
        self._folder = run_dir / FOLDER
        self._rank = rank
        self._profiler: torch.profiler.profile | None = None
        self._named = contextlib.ExitStack()  # the global step under way, as the trace names it
        self._last_begun = -1

    def at_step(self, step: int) -> None:
        """A global step begins, and with it ends the one before."""
        if self._steps is None:
            return
        self._named.close()
        first, last = self._steps
        if step > last:
            self.close()
        elif step >= first:
            if self._profiler is None:
                activities = [torch.profiler.ProfilerActivity.CPU]
                if torch.cuda.is_available():
                    activities.append(torch.profiler.ProfilerActivity.CUDA)
                self._profiler = torch.profiler.profile(activities=activities)
                self._profiler.start()
            self._named.enter_context(torch.profiler.record_function(f"global step {step}"))
            self._last_begun = step

    def close(self) -> None:
        """Write the trace, if one is under way; whole or not at all."""
        self._named.close()
        if self._profiler is None:
            return
        assert self._steps is not None
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        self._folder.mkdir(exist_ok=True)
        path = self._folder / f"steps_{self._steps[0]}-{self._last_begun}_rank_{self._rank}.pt.trace.json.gz"
        partial = path.with_name(f".partial-{secrets.token_hex(4)}.json.gz")
        profiler.export_chrome_trace(str(partial))
        os.replace(partial, path)


def write_phases(config: RunConfig, run_dir: Path, metrics: Sequence[Mapping[str, float | None]]) -> str:
    """Write RUN/profile/phases.md: seconds by phase of the traced steps beside the planner's. Returns what to say about it.

    metrics: the lines of metrics.jsonl.
    """
    steps = config.profile.first_and_last
    assert steps is not None
    lines = [line for line in metrics if steps[0] <= (line["global_step"] or 0) <= steps[1]]
    if not lines:
        return f"profile.steps = {config.profile.steps}: the run had no such step, nothing was traced."
    seconds = {phase: _mean(lines, f"time/{phase}") for phase in _PHASES}
    length = _mean([line for line in metrics if line.get("rollout/length")], "rollout/length")
    try:
        hardware = hardware_of_device(detect().device_name)
    except ValueError as error:  # said in the table's place: the run itself is done and fine
        predicted, source = {}, f"no prediction: {error}"
    else:
        predicted = predict_phases(config, hardware, mean_tokens=None if length is None else max(1, round(length)))
        source = f"predicted: minpro plan's model of {hardware}, responses of {length or 0:.0f} tokens on average"
    rows = [[phase, _text(seconds[phase]), _text(predicted.get(phase))] for phase in _PHASES if seconds[phase] is not None]
    table = markdown_table(["phase", f"measured s, mean of global steps {steps[0]} to {steps[1]}, traced", "predicted s"], rows)
    write_atomically(run_dir / FOLDER / PHASES_FILE, f"{table}\n{source}\n")
    return f"Traces and predictions of the profiled steps are in {run_dir / FOLDER}."


def predict_phases(config: RunConfig, hardware: str, *, mean_tokens: int | None) -> dict[str, float]:
    """The planner's seconds of a global step by phase. Sampling on a CPU is left out: the planner knows servers on GPUs alone."""
    machine = read_hardware(hardware)
    work = planning.reinforcement_work(config, mean_tokens=mean_tokens, colocated=False)
    training = planning.training_of(config, machine, TrainingChoice())
    step = make_plan(planning.shape_of(config), config.layout, training, machine, work).global_step
    assert step is not None
    found = {"score": step.logprobs_s, "update": step.updates_s, "sync": step.sync_s}
    return found if machine.measured else {"sample": step.sampling.batch_s, **found}


def _mean(lines: Sequence[Mapping[str, float | None]], name: str) -> float | None:
    values = [value for line in lines if (value := line.get(name)) is not None]
    return sum(values) / len(values) if values else None


def _text(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.3g}"
