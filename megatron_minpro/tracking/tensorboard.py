"""RUN_DIR/tensorboard: the numbers of metrics.jsonl as event files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
        try:
            for name, value in metrics.items():
                self._events.add_scalar(name, value, step)
            self._events.flush()
        except OSError:
            self._events = None  # its thread has ended
            raise

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Close the event file."""
        if self._events is not None:
            self._events.close()
            self._events = None
