"""Seconds in words."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """For people: 45 s, 12 min, 3 h 20 min, 5.2 days."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes < 48 * 60 else f"{minutes / 1440:.1f} days"
