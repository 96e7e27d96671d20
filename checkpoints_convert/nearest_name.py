"""The end of an error message about an unknown name: the known name that is closest to it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The known name that is most like `name`; None when none is alike.

    Args:
        name: what was written.
        known: the names that exist.
        cutoff: how alike they must be, from 0 (anything) to 1 (equal).
    """
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """E.g. "did you mean 'dapo'?", or "no known name is near it"."""
    near = closest(name, known)
    return "no known name is near it" if near is None else f"did you mean {near!r}?"


def nearest(name: str, known: Iterable[str]) -> str:
    """E.g. "did you mean 'dapo'? known: dapo, boxed". The question is left out when no name is near."""
    known = list(known)
    near = closest(name, known)
    question = "" if near is None else f"did you mean {near!r}? "
    return f"{question}known: {', '.join(known) or 'none'}"
