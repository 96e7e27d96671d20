"""The clock of one global step: its wall time and that of its phases, over all attempts that worked on it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from megatron_minpro.loop.counters import StepSeconds


class PhaseTimer:
    """Wall seconds of one step, and of its phases. Phases may overlap, so their sum can exceed the wall time."""

    def __init__(self, tell: Callable[[str], None], *, before: StepSeconds | None = None) -> None:
        """
        Args:
            tell: called with the name of each phase when it begins.
            before: what an earlier attempt spent on the step.
        """
        self.seconds: dict[str, float] = {} if before is None else dict(before.phases)
        self.scored_before_s = 0.0 if before is None else before.scored_before  # of scoring the batch before, where it is part of this step
        self._tell = tell
        self._before_s = 0.0 if before is None else before.wall
        self._started_at = time.perf_counter()
        self._wall_s: float | None = None

    def stop(self) -> None:
        """The step ends now; what is measured later still counts for its phases."""
        self._wall_s = self.wall_s()

    def wall_s(self) -> float:
        """From the beginning of the step to `stop`, or to now."""
        return self._before_s + time.perf_counter() - self._started_at if self._wall_s is None else self._wall_s

    def reading(self) -> StepSeconds:
        """What a checkpoint keeps."""
        return StepSeconds(phases=dict(self.seconds), scored_before=self.scored_before_s, wall=self.wall_s())

    def split(self, phase: str, part: str, seconds: float) -> None:
        """Count `seconds` of a phase under a name of their own."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) - seconds
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        self._tell(phase)
        with torch.profiler.record_function(phase):
            yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
