"""Wall seconds of a run over all its attempts, those that were killed included."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Lock, Thread

from checkpoints_convert.atomic_files import write_atomically
from megatron_minpro.tracking.run_files import SECONDS_FILE

_WRITE_EVERY_S = 2.0


class AttemptClock:
    """Adds this attempt to what RUN_DIR/seconds.json says, every few seconds: kill -9 costs no more than those.

    Phases may be inside each other; each counts its own wall time.
    """

    def __init__(self, run_dir: Path) -> None:
        """Raises ValueError for a seconds.json that is none."""
        self._path = run_dir / SECONDS_FILE
        self._lock = Lock()
        self._finished: dict[str, float] = {}
        self._running: dict[str, float] = {}  # when it began
        if self._path.exists():
            try:
                self._finished = {str(name): float(value) for name, value in json.loads(self._path.read_text(encoding="utf-8")).items()}
            except (ValueError, AttributeError, TypeError) as error:
                raise ValueError(f"{self._path}: expected one JSON object with seconds by phase ({error})") from error

    def seconds(self) -> dict[str, float]:
        """By phase until now, over all attempts."""
        now = time.monotonic()
        with self._lock:
            running = {name: now - begin for name, begin in self._running.items()}
            return {name: self._finished.get(name, 0.0) + running.get(name, 0.0) for name in {**self._finished, **running}}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block under `name`."""
        with self._lock:
            self._running[name] = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._finished[name] = self._finished.get(name, 0.0) + time.monotonic() - self._running.pop(name)

    @contextmanager
    def written(self) -> Iterator[None]:
        """Keep the file up to date during the block."""
        ended = Event()

        def write() -> None:
            while not ended.wait(_WRITE_EVERY_S):
                self._write()

        thread = Thread(target=write, name="attempt clock", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self._write()

    def _write(self) -> None:
        with suppress(OSError):  # a full disk: what the run itself cannot write ends it, with a reason
            write_atomically(self._path, json.dumps(self.seconds()) + "\n", durable=False)
