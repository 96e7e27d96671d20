"""The end of an error message about an unknown name: the nearest known one, and all of them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """E.g. "did you mean 'dapo'? known: dapo, boxed"; the question is left out when nothing comes near."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    question = f"did you mean {near[0]!r}? " if near else ""
    return f"{question}known: {', '.join(known) or 'none'}"
