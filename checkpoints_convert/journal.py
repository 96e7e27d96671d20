"""The list of tensors that an unfinished conversion has written, so that the next attempt skips them."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

from checkpoints_convert.atomic_directory import empty

_FILE = "journal.jsonl"
_FLUSH_SECONDS = 2.0


class Journal:
    """One line per finished item, written only after the item's bytes are on the disk; so each line is a proof.

    fingerprint: names everything that the result depends on. Several threads may add. Open it before any data file is made: a folder
    without a journal is emptied.
    """

    def __init__(self, directory: Path, *, fingerprint: str) -> None:
        """Reads what an earlier attempt left in the directory. Raises ValueError when that attempt was at something else."""
        self._path = directory / _FILE
        self._lock = threading.Lock()
        self._flushing = threading.Lock()
        self._pending: dict[str, Mapping[str, str]] = {}
        self._flushed_at = time.monotonic()
        self.done: dict[str, Mapping[str, str]] = {}  # item -> its hashes by tensor name
        complete_bytes = self._read(fingerprint) if self._path.exists() else 0
        if not complete_bytes:
            empty(directory)  # an attempt was killed before its first line or after its last: what lies there is of no known origin
        self._file = self._path.open("ab", buffering=0)
        self._file.truncate(complete_bytes)
        if not complete_bytes:
            self._write(json.dumps({"fingerprint": fingerprint}).encode() + b"\n")

    def add(self, item: str, hashes: Mapping[str, str], *, sync: Callable[[], None]) -> None:
        """An item whose bytes have been written. sync flushes the data files; it is called every few seconds, before the lines."""
        with self._lock:
            self._pending[item] = self.done[item] = hashes
            due = time.monotonic() - self._flushed_at > _FLUSH_SECONDS
        if due and self._flushing.acquire(blocking=False):
            try:
                with self._lock:
                    pending, self._pending = self._pending, {}
                sync()
                self._write(b"".join(json.dumps([name, dict(found)]).encode() + b"\n" for name, found in pending.items()))
                self._flushed_at = time.monotonic()
            finally:
                self._flushing.release()

    def remove(self) -> None:
        """The result is complete and needs no journal."""
        self._path.unlink()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def _write(self, lines: bytes) -> None:
        try:
            self._file.write(lines)
            os.fsync(self._file.fileno())
        except OSError as error:  # it knows no file name
            raise OSError(error.errno, error.strerror, os.fspath(self._path)) from error

    def _read(self, fingerprint: str) -> int:
        """Takes over the complete lines of the file and returns their length in bytes: a kill may have cut the last one."""
        content = self._path.read_bytes()
        complete = content[: content.rfind(b"\n") + 1]
        if not complete:
            return 0
        try:
            first, *items = [json.loads(line) for line in complete.splitlines()]
        except ValueError as error:
            raise ValueError(f"{self._path}: not a journal ({error}); expected to start anew without resuming") from error
        if first != {"fingerprint": fingerprint}:
            raise ValueError(
                f"{self._path.parent}: an unfinished conversion of another source, or with other options; expected the same ones, or to "
                "start anew without resuming"
            )
        self.done.update(items)
        return len(complete)
