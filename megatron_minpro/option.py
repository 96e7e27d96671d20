"""An option of a command, described on the field of the record that holds its value.

@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    servers: Annotated[int, Option("to start", minimum=1)] = 1

commands/parameters.py turns such a record into the command's options, and what was given back into the record.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Option:
    """What a field is as an option of a command.

    help: what the value means.
    flags: how it is written; left out, the field's name with dashes.
    argument: it has no flag but a place on the command line.
    metavar: stands for the value in the help.
    minimum: the smallest number allowed.
    variable: an environment variable that gives the value where the command line does not.
    given: the type of what is written, where it is not the field's; `read` makes the field's value of it.
    read: raises ValueError, naming the option, for what cannot be read.
    """

    help: str
    flags: tuple[str, ...] = ()
    argument: bool = False
    metavar: str | None = None
    minimum: float | None = None
    variable: str | None = None
    given: Any = None
    read: Callable[[Any], Any] | None = None
