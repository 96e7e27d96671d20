"""RUN_DIR/tensorboard: the numbers of metrics.jsonl as event files, with histograms of log ratios and a few responses as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_minpro.tracking.response_text import markdown
from megatron_minpro.tracking.step_details import Histogram, StepDetails

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

TENSORBOARD_FOLDER = "tensorboard"


class TensorBoard:
    """The tracker `tensorboard`."""

    def __init__(self, run_dir: Path) -> None:
        self._folder = run_dir / TENSORBOARD_FOLDER
        self._events: SummaryWriter | None = None

    def start(self, config: Mapping[str, Any]) -> None:
        """Nothing: the folder is opened by the first step, which hides later events of an earlier attempt."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One scalar per metric, flushed. After an OSError (a full disk) the next step opens a new file."""
        if self._events is None:
            from torch.utils.tensorboard import SummaryWriter  # a second to import; console and summary do without

            self._events = SummaryWriter(str(self._folder), purge_step=step)
        with self._flushed() as events:
            for name, value in metrics.items():
                events.add_scalar(name, value, step)

    def log_details(self, step: int, details: StepDetails) -> None:
        """The histograms under their names, the responses as response/0, response/1, ..., flushed."""
        with self._flushed() as events:
            for name, histogram in details.filled_histograms().items():
                events.add_histogram_raw(name, global_step=step, **raw_histogram(histogram))
            for number, response in enumerate(details.responses):
                events.add_text(f"response/{number}", markdown(response), step)

    @contextmanager
    def _flushed(self) -> Iterator[SummaryWriter]:
        assert self._events is not None, "the step's numbers come first"
        try:
            yield self._events
            self._events.flush()
        except OSError:
            self._events = None  # its thread has ended
            raise

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Close the event file."""
        if self._events is not None:
            self._events.close()
            self._events = None


def raw_histogram(histogram: Histogram) -> dict[str, Any]:
    """A histogram with some count as `add_histogram_raw` wants it.

    TensorBoard shows bounds and buckets. The sums, which it does not show, are of the bins' middles.
    """
    bounds, counts = histogram.filled()
    middles = [(low + high) / 2 for low, high in pairwise(bounds)]
    return {
        "min": bounds[0],
        "max": bounds[-1],
        "num": sum(counts),
        "sum": sum(count * middle for count, middle in zip(counts, middles, strict=True)),
        "sum_squares": sum(count * middle**2 for count, middle in zip(counts, middles, strict=True)),
        "bucket_limits": bounds[1:],
        "bucket_counts": counts,
    }
