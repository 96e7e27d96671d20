"""Check annotated shapes and dtypes at every call of these modules. tests/conftest.py installs it before any of them is imported."""

from __future__ import annotations

import typing
from collections.abc import Callable
from typing import Any

from beartype import beartype
from jaxtyping import AbstractArray, install_import_hook

CHECKED = (
    *("parallel.prefix_scan", "parallel.sequence_shard", "parallel.logprobs", "parallel.packing", "parallel.token_sequence"),
    "megatron_minpro.objectives",
)


def install() -> None:
    """Modules that are imported from now on are checked."""
    install_import_hook(CHECKED, "tests.shape_checks.check")


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its shapes checked. Other annotations are mypy's: tests hand in fakes and wrong values."""
    function.__annotations__ = {name: hint for name, hint in function.__annotations__.items() if _has_shape(hint)}
    return beartype(function)


def _has_shape(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return any(_has_shape(part) for part in typing.get_args(hint))
