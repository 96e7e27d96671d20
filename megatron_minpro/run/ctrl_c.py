"""Ctrl-C as a wish: counted, and answered when it suits."""

from __future__ import annotations

import signal
from types import FrameType


class CtrlC:
    """Counts SIGINT and SIGTERM inside a `with` block instead of dying of them. times: how many came."""

    def __init__(self) -> None:
        self.times = 0
        self._former: dict[int, object] = {}

    def __enter__(self) -> CtrlC:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._former[number] = signal.signal(number, self._count)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _count(self, _number: int, _frame: FrameType | None) -> None:
        self.times += 1
