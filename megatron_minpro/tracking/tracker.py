"""Where a run's numbers go: metrics.jsonl always, and the trackers that tracking.trackers names.

A tracker of your own is a class or function `package.module:name`. It is called with the run folder and its options, and returns an
object with the three methods of `Tracker`, and with that of `DetailTracker` where it can show histograms and texts. The checks before a run
make it too, so it begins its work in `start`. Only rank 0 starts it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from megatron_minpro.config import TrackerConfig
from megatron_minpro.registry import PlugIns
from megatron_minpro.tracking.late_files import LateFiles
from megatron_minpro.tracking.metrics_file import METRICS_FILE, MetricsFile
from megatron_minpro.tracking.metrics_table import check_declared
from megatron_minpro.tracking.step_details import StepDetails

log = logging.getLogger(__name__)

TRACKERS = PlugIns(
    setting="tracking.trackers",
    options="tracking.trackers",
    known={
        "tensorboard": "megatron_minpro.tracking.tensorboard:TensorBoard",
        "wandb": "megatron_minpro.tracking.wandb:Wandb",
    },
)


@runtime_checkable
class Tracker(Protocol):
    """One place that a run's numbers go to."""

    def start(self, config: Mapping[str, Any]) -> None:
        """Called once, before the first step of an attempt. config: the resolved configuration as plain values."""
        ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Called once per global step, in order. A resumed attempt begins after the step of its checkpoint.

        Args:
            step: the global step, from 0.
            metrics: names of metrics_table.py; finite numbers only.
        """
        ...

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Called once when the attempt ends well. summary: what summary.json says, or where a stopped run stands."""
        ...


@runtime_checkable
class DetailTracker(Tracker, Protocol):
    """A tracker that takes more than numbers."""

    def log_details(self, step: int, details: StepDetails) -> None:
        """Called after `log` of the same step, where the step has trained a batch."""
        ...


def make_tracker(config: TrackerConfig, run_dir: Path) -> Tracker:
    """The tracker that one entry of tracking.trackers names.

    Raises:
        PlugInError: there is no such tracker, it does not take the options, or it refuses them.
    """
    factory = TRACKERS.find(config.name, config.options, passed=1)
    try:
        tracker = factory(run_dir, **config.options)
    except ValueError as error:
        raise TRACKERS.refused(config.name, error) from error
    if not isinstance(tracker, Tracker):
        raise TRACKERS.refused(config.name, TypeError(f"made a {type(tracker).__name__}, expected an object with start, log and finish"))
    return tracker


class RunTracker:
    """metrics.jsonl and every tracker of the run, told the same."""

    def __init__(self, file: MetricsFile, trackers: Sequence[Tracker], files: LateFiles) -> None:
        """files: writes the lines of `file`."""
        self._file = file
        self._trackers = trackers
        self._files = files
        self._behind: set[int] = set()  # trackers that a full disk keeps from writing

    def start(self, config: Mapping[str, Any]) -> None:
        """Tell all trackers that the run begins."""
        for tracker in self._trackers:
            tracker.start(config)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one global step. A number that is not finite becomes null in metrics.jsonl and is left out elsewhere.

        A line that a full disk cannot take is written later. A tracker that cannot write now lacks the step, which is a warning.

        Raises:
            ValueError: a metric is not declared in metrics_table.py, or the step does not follow the last one.
        """
        check_declared(metrics)
        values = {name: value if isinstance(value, int) else float(value) for name, value in metrics.items()}
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        line = {name: finite.get(name) for name in values}
        self._files.write(f"{METRICS_FILE} of step {step}", lambda: self._file.log(step, line))
        for number, tracker in enumerate(self._trackers):
            self._tell(number, step, partial(tracker.log, step, finite))

    @property
    def takes_details(self) -> bool:
        """Whether some tracker can show more than numbers."""
        return any(isinstance(tracker, DetailTracker) for tracker in self._trackers)

    def log_details(self, step: int, details: StepDetails) -> None:
        """Tell the trackers that take them. Call it after `log`; a tracker that could not write the step's numbers is left out."""
        for number, tracker in enumerate(self._trackers):
            if isinstance(tracker, DetailTracker) and number not in self._behind:
                self._tell(number, step, partial(tracker.log_details, step, details))

    def _tell(self, number: int, step: int, say: Callable[[], None]) -> None:
        try:
            say()
            self._behind.discard(number)
        except OSError as error:
            if number not in self._behind:
                name = type(self._trackers[number]).__name__
                log.warning("%s lacks global step %d and those until it can write again: %s; %s has them", name, step, error, METRICS_FILE)
            self._behind.add(number)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Tell all trackers how the run ended, and close the file."""
        for tracker in self._trackers:
            tracker.finish(summary)
        self._file.close()
