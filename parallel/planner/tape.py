"""Bytes that come and go in the order of a step, and what was alive at the fullest moment."""

from __future__ import annotations

from collections.abc import Mapping


class Tape:
    """A running sum by part of memory."""

    def __init__(self, resident: Mapping[str, float]) -> None:
        """resident: part -> bytes that stay from beginning to end."""
        self._parts = dict(resident)
        self._live = sum(resident.values())
        self._moment = ""
        self.peak = 0.0
        self.fullest: dict[str, float] = {}
        self.fullest_moment = ""
        self.at(self._moment)

    def at(self, moment: str) -> None:
        """What follows belongs to this moment of a step."""
        self._moment = moment
        self._look()

    def hold(self, part: str, num_bytes: float) -> None:
        """So many bytes more."""
        self._parts[part] = self._parts.get(part, 0.0) + num_bytes
        self._live += num_bytes
        self._look()

    def drop(self, part: str, num_bytes: float) -> None:
        """So many bytes less."""
        self._parts[part] = self._parts.get(part, 0.0) - num_bytes
        self._live -= num_bytes

    def flash(self, part: str, num_bytes: float) -> None:
        """Held for a moment."""
        self.hold(part, num_bytes)
        self.drop(part, num_bytes)

    def release(self, *parts: str) -> None:
        """Nothing of these parts is left."""
        for part in parts:
            self.drop(part, self.held(part))

    def held(self, part: str) -> float:
        """Bytes of a part that are alive now."""
        return self._parts.get(part, 0.0)

    def _look(self) -> None:
        if self._live > self.peak:
            self.peak, self.fullest, self.fullest_moment = self._live, dict(self._parts), self._moment
