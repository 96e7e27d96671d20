"""The user's working folder comes after our packages: a `parallel.py` or `rollout/` of the user's own hides nothing of ours.

Python looks for modules in the working folder first after `python -m`, and where PYTHONPATH has an empty entry or a dot. `registry.py`
finds the user's plug-ins there after everything else.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

_PACKAGES = Path(__file__).resolve().parents[1]


def without_working_folder(search_path: Sequence[str]) -> list[str]:
    """The entries that are not the working folder; all of them where the working folder is the one with our packages."""
    here = Path.cwd().resolve()
    return [entry for entry in search_path if here == _PACKAGES or Path(entry).resolve() != here]


def child_environment() -> dict[str, str]:
    """This process's environment, for a Python that must not look for modules in the working folder first."""
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    if "PYTHONPATH" in environment:
        environment["PYTHONPATH"] = os.pathsep.join(without_working_folder(environment["PYTHONPATH"].split(os.pathsep)))
    return environment
