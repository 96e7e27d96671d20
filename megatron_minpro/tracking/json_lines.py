"""A file of JSON lines that grows by whole lines: what was written survives a kill, and a torn last line is found and counted."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

_BLOCK_BYTES = 1 << 16


class JsonLines:
    """Appends to a file, and reads it while it grows. One writer at a time."""

    def __init__(self, path: Path) -> None:
        """Open or make the file. An unfinished last line (of a killed writer) is cut off; torn_lines is 1 if there was one, else 0."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)
        self._size = _end_of_last_line(path)
        self.torn_lines = int(self._size < path.stat().st_size)
        if self.torn_lines:
            self._file.truncate(self._size)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line and hand it to the operating system before this returns: a kill of this process loses nothing.

        Raises:
            OSError: a full disk, with the file's name. Nothing of the line stays; the call may be repeated.
        """
        line = memoryview(json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace") + b"\n")
        try:
            if self._file.seek(0, os.SEEK_END) > self._size:  # the cut after a failure failed too
                self._file.truncate(self._size)
            written = 0
            while written < len(line):
                written += self._file.write(line[written:])
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(self._size)
            raise OSError(error.errno, error.strerror, os.fspath(self.path)) from error
        self._size += len(line)

    def cut(self, size: int) -> None:
        """Forget everything behind byte `size`, which must be the end of a line; see `read_json_lines`."""
        self._file.truncate(size)
        self._size = size
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush to the disk and close. Calling it again does nothing."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()


def read_json_lines(path: Path, *, start: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """(offset behind the line, record) of the complete lines from byte `start` on.

    An unfinished last line is left out. A file that does not exist has no lines.

    Raises:
        ValueError: a line is not a JSON object. The message names file and line.
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
                raise ValueError(f"{path}:{line_number(path, offset)}: expected one JSON object per line ({error})") from error
            if not isinstance(record, dict):
                raise ValueError(f"{path}:{line_number(path, offset)}: expected a JSON object, found a {type(record).__name__}")
            offset += len(line)
            yield offset, record


def line_number(path: Path, offset: int) -> int:
    """The number, from 1, of the line that begins at byte `offset`. Reads the file up to there: for error messages."""
    with path.open("rb") as file:
        return 1 + file.read(offset).count(b"\n")


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
