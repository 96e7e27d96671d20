"""Small files of a run, written by a thread: a full disk or a file system that does not answer costs no training.

What cannot be written waits in memory and is tried again, in order, with whatever is written next and every few seconds. A checkpoint is
complete only after `flush`: so nothing that a checkpoint tells of can be missing beside it.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Condition, Thread

from checkpoints_convert.atomic_directory import mount_point

log = logging.getLogger(__name__)

_PATIENCE_S = 5.0  # how long a write is waited for
_RETRY_S = 5.0
_FLUSH_S = 120.0


@dataclass(frozen=True, slots=True)
class _File:
    name: str
    write: Callable[[], object]
    may_be_lost: bool


class LateFiles:
    """One thread writes. All methods may be called by any thread."""

    def __init__(self, folder: Path, *, patience_s: float = _PATIENCE_S) -> None:
        """
        Args:
            folder: where the files lie, for messages.
            patience_s: how long `write` waits for a file system that does not answer.
        """
        self._folder = folder
        self._patience_s = patience_s
        self._changed = Condition()
        self._waiting: dict[str, _File] = {}  # by name, the oldest first; the first one may be under way
        self._silent = False  # what is under way takes longer than anyone waits
        self._trouble: OSError | None = None  # of the last try
        self._failed_tries = 0
        self._lost: set[str] = set()  # since the trouble began
        self._fault: Exception | None = None
        Thread(target=self._work, name="late files", daemon=True).start()

    def write(self, name: str, action: Callable[[], object], *, may_be_lost: bool = False) -> None:
        """Returns when the file is written, or has to wait.

        Args:
            name: of the file, for messages; what waits under this name is replaced.
            action: writes it. Called again after an OSError, so it must leave nothing half-written.
            may_be_lost: a file for people, or one that is written anew soon: dropped where it cannot be written at once.

        Raises:
            Exception: what an action raised, unless that was an OSError.
        """
        with self._changed:
            if may_be_lost and (self._silent or (self._trouble is not None and self._waiting)):
                self._lost.add(name)
                return
            self._waiting.pop(name, None)
            self._waiting[name] = _File(name, action, may_be_lost)
            if not self._silent and not self._tried(self._patience_s):
                self._silent = True
                log.warning("%s: its file system does not answer; what is to be written waits in memory, training goes on", self._folder)
            self._raise_fault()

    def flush(self, timeout_s: float = _FLUSH_S) -> None:
        """Raises OSError unless everything is written."""
        with self._changed:
            if not self._tried(timeout_s):
                raise TimeoutError(f"{self._folder}: its file system does not answer, {', '.join(self._waiting)} cannot be written")
            self._raise_fault()
            if self._trouble is not None and self._waiting:
                raise self._trouble

    def _tried(self, timeout_s: float) -> bool:
        """Wait until nothing waits or a try fails. False when that takes too long."""
        self._changed.notify_all()
        before = self._failed_tries
        return self._changed.wait_for(lambda: not self._waiting or self._failed_tries > before, timeout_s)

    def _raise_fault(self) -> None:
        if self._fault is not None:
            fault, self._fault = self._fault, None
            raise fault

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    self._changed.wait()
                file = next(iter(self._waiting.values()))
            said, trouble, fault = "", None, None
            try:
                file.write()
            except OSError as error:
                said, trouble = self._describe(file, error), error
            except Exception as error:  # for the thread that asked
                fault = error
            with self._changed:
                self._silent = False
                self._fault = self._fault or fault
                if (trouble is None or file.may_be_lost) and self._waiting.get(file.name) is file:
                    del self._waiting[file.name]
                self._take_note(file, trouble, said)
                self._changed.notify_all()
                if trouble is not None:
                    self._changed.wait(_RETRY_S)

    def _take_note(self, file: _File, trouble: OSError | None, said: str) -> None:
        if trouble is not None:
            self._failed_tries += 1
            if file.may_be_lost:
                self._lost.add(file.name)
            if self._trouble is None:
                log.warning("%s; %s, training goes on", said, "it is left out" if file.may_be_lost else "it waits in memory")
            self._trouble = trouble
        elif self._trouble is not None and not self._waiting:
            lost = f"; lost: {', '.join(sorted(self._lost))}" if self._lost else ""
            log.warning("%s: can be written again, and what waited is%s", self._folder, lost)
            self._lost.clear()
            self._trouble = None

    def _describe(self, file: _File, error: OSError) -> str:
        said = f"{self._folder}: {file.name} cannot be written: {error.strerror or error}"
        try:
            place = mount_point(self._folder)
            return f"{said}; {shutil.disk_usage(place).free:,} bytes are free on {place}"
        except OSError:  # it has said enough
            return said
