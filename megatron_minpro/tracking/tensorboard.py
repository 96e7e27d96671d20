"""RUN_DIR/tensorboard: the numbers of metrics.jsonl as event files, with histograms of log ratios and a few responses as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_minpro.tracking.step_details import Histogram, StepDetails

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

TENSORBOARD_FOLDER = "tensorboard"
_SHOWN_CHARACTERS = 4000  # of a prompt or response


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
            for name, histogram in details.histograms.items():
                if any(histogram.counts):
                    events.add_histogram_raw(name, global_step=step, **raw_histogram(histogram))
            for number, response in enumerate(details.responses):
                events.add_text(f"response/{number}", response_text(response), step)

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
    """A histogram with some count as `add_histogram_raw` wants it, without the empty bins at both ends.

    An open bin ends at its one edge. TensorBoard shows bounds and buckets. The sums, which it does not show, are of the bins' middles.
    """
    filled = [index for index, count in enumerate(histogram.counts) if count]
    bounds = [histogram.edges[0], *histogram.edges, histogram.edges[-1]]  # of bin i: i and i + 1
    bins = range(filled[0], filled[-1] + 1)
    middles = [(bounds[index] + bounds[index + 1]) / 2 for index in bins]
    counts = [float(histogram.counts[index]) for index in bins]
    return {
        "min": bounds[bins[0]],
        "max": bounds[bins[-1] + 1],
        "num": sum(counts),
        "sum": sum(count * middle for count, middle in zip(counts, middles, strict=True)),
        "sum_squares": sum(count * middle**2 for count, middle in zip(counts, middles, strict=True)),
        "bucket_limits": [bounds[index + 1] for index in bins],
        "bucket_counts": counts,
    }


def response_text(response: Mapping[str, Any]) -> str:
    """Markdown. What came from a model or a data set stands in code blocks, so nothing in it is markup."""
    facts = [
        f"reward {response['reward']:g}",
        f"advantage {response['advantage']:.3g}",
        f"{response['num_response_tokens']} tokens",
        f"finished by {response['finish_reason']}",
        f"policy version {response['policy_version']}",
    ]
    parts = [f"{name}:\n\n{_code_block(str(response[name]))}" for name in ("prompt", "response", "answer", "extracted")]
    return "\n\n".join([", ".join(facts), *parts])


def _code_block(text: str) -> str:
    cut = text[:_SHOWN_CHARACTERS] + (f" ... and {len(text) - _SHOWN_CHARACTERS:,} characters" if len(text) > _SHOWN_CHARACTERS else "")
    return "\n".join(f"    {line}" for line in cut.splitlines() or [""])
