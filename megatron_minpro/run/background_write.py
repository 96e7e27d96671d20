"""One checkpoint that a thread of this rank writes, and how all ranks agree on how that went."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Thread
from typing import Any, Literal

import torch.distributed as dist

# A file system that is slower than this, for all ranks together, is taken for one that does not answer.
SLOWEST_BYTES_PER_S = 250e6
LEAST_LIMIT_S = 300.0


def time_limit_s(num_bytes: int) -> float:
    """How long writing a checkpoint of all ranks together may take."""
    return LEAST_LIMIT_S + num_bytes / SLOWEST_BYTES_PER_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """Why a checkpoint is not there.

    kind: disk: the disk refused; stalled: it does not answer; fault: anything else.
    """

    kind: Literal["disk", "stalled", "fault"]
    reason: str


class BackgroundWrite:
    """Begins when it is made."""

    def __init__(self, name: str, write: Callable[[], None], *, limit_s: float) -> None:
        """
        Args:
            name: of the checkpoint.
            write: writes this rank's part; an OSError is the disk's.
            limit_s: how long `trouble` waits at most, counted from now.
        """
        self.name = name
        self._write = write
        self._limit_s = limit_s
        self._began_at = time.monotonic()
        self._trouble: Trouble | None = None
        self._thread = Thread(target=self._run, name=f"checkpoint {name}", daemon=True)
        self._thread.start()

    def trouble(self) -> Trouble | None:
        """Wait for the end, or for the time limit. None when this rank's part is on disk. Not collective."""
        self._thread.join(max(0.0, self._began_at + self._limit_s - time.monotonic()))
        if not self._thread.is_alive():
            return self._trouble
        seconds = time.monotonic() - self._began_at
        late = f"{self.name} has been under way for {seconds:.0f} s, expected at most {self._limit_s:.0f}"
        return Trouble(kind="stalled", reason=f"{late}: its file system does not answer")

    def _run(self) -> None:
        try:
            self._write()
        except OSError as error:
            self._trouble = Trouble(kind="disk", reason=" ".join(str(error).split()))
        except BaseException as error:  # without this the error would be lost
            self._trouble = Trouble(kind="fault", reason=f"{type(error).__name__}: {' '.join(str(error).split())}")
        finally:
            self._write = _nothing  # and what it holds: a copy of the whole state


def agree(trouble: Trouble | None, group: dist.ProcessGroup) -> Trouble | None:
    """Collective. The worst trouble of any rank, on every rank: fault, then stalled, then disk. Of equal ones that of the lowest rank."""
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, trouble, group=group)
    for kind in ("fault", "stalled", "disk"):
        for one in found:
            if one is not None and one.kind == kind:
                return one
    return None


def _nothing() -> None:
    """Nothing is left to write."""
