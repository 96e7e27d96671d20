"""Let a module be imported when it is first used, where others import it at their start and most processes never use it."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable, Collection
from typing import Any


class _Deferred(types.ModuleType):
    """Stands in for a module until something is asked of it that only the module itself can answer."""

    def __init__(self, name: str, *, functions: Collection[str], exceptions: Collection[str], package: bool) -> None:
        super().__init__(name)
        self._is_package = package
        self._placeholders = {function: self._first_call_of(function) for function in functions}
        self._placeholders |= {error: type(error, (Exception,), {"__module__": name}) for error in exceptions}

    def __getattr__(self, attribute: str) -> Any:
        # The import system looks for such names; __path__ is asked of a package when a module in it is wanted.
        if attribute.startswith("__") and not (attribute == "__path__" and self._is_package):
            raise AttributeError(attribute)
        if sys.modules.get(self.__name__) is self and attribute in self._placeholders:
            return self._placeholders[attribute]
        return getattr(self._load(), attribute)

    def _first_call_of(self, function: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            return getattr(self._load(), function)(*arguments, **options)

        return call

    def _load(self) -> types.ModuleType:
        """Import the module. Whoever has taken a placeholder gets the real thing in its place."""
        name = self.__name__
        if sys.modules.get(name) is self:
            del sys.modules[name]
        real = importlib.import_module(name)
        for module in list(sys.modules.values()):
            names = getattr(module, "__dict__", {})
            for attribute, placeholder in self._placeholders.items():
                if names.get(attribute) is placeholder:
                    setattr(module, attribute, getattr(real, attribute))
        return real


def defer(name: str, *, functions: Collection[str] = (), exceptions: Collection[str] = (), package: bool = False) -> None:
    """From now on importing `name` takes no time; the module is imported when it is used. Nothing happens where it is imported already.

    Args:
        name: of a module in a package that is imported.
        functions: what may be imported from it before it is used: a call imports it. Any other name imports it at once.
        exceptions: the same for classes that are only caught. They are raised by nobody before the module is imported.
        package: whether it has modules of its own. Importing one of them imports it at once.
    """
    if name in sys.modules:
        return
    deferred = sys.modules[name] = _Deferred(name, functions=functions, exceptions=exceptions, package=package)
    parent, _, own = name.rpartition(".")
    setattr(sys.modules[parent], own, deferred)


def defer_symbolic_shapes() -> None:
    """Defer torch's symbolic shapes, and with them sympy: torch.distributed.tensor imports them, which is a fifth of what a rank imports.

    They describe tensors whose shape is a symbol, which only torch.compile makes.
    """
    import torch.fx.experimental  # noqa: F401  the package

    defer(
        "torch.fx.experimental.symbolic_shapes",
        functions=("guard_or_false", "guard_or_true", "statically_known_true"),
        exceptions=("GuardOnDataDependentSymNode",),
    )
