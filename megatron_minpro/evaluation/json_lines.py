"""A file of JSON lines that grows by whole lines: what was written survives a kill, and a torn last line is found and counted."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK_BYTES = 1 << 16


class JsonLines:
    """Appends to a file, and reads it while it grows. One writer at a time."""

    def __init__(self, path: Path) -> None:
        """Opens or makes the file; an unfinished last line (of a killed writer) is cut off. torn_lines: 1 if there was one, else 0."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")
        whole = _end_of_last_line(path)
        self.torn_lines = int(whole < path.stat().st_size)
        if self.torn_lines:
            self._file.truncate(whole)

    def append(self, record: dict[str, Any]) -> None:
        """One line, handed to the operating system before this returns: a kill of this process loses nothing."""
        self._file.write(json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace") + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Flush to the disk and close. Calling it again does nothing."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()


def read_json_lines(path: Path, *, start: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """(offset behind the line, record) of the complete lines from byte `start` on; an unfinished last line is left out.

    Raises ValueError naming file and line for anything that is not a JSON object.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(start)
        offset = start
        for line in file:
            if not line.endswith(b"\n"):
                return  # being written right now
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}: the line at byte {offset} is not JSON: {error}") from error
            if not isinstance(record, dict):
                raise ValueError(f"{path}: the line at byte {offset} is a {type(record).__name__}, expected a JSON object")
            offset += len(line)
            yield offset, record


def _end_of_last_line(path: Path) -> int:
    """Bytes up to and including the last line feed."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - _BLOCK_BYTES)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
    return 0
