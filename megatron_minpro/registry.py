"""Plug-ins: a setting names a known entry or `package.module:function`, and gets a checked callable.

A table of known names holds import paths, so that a table imports nothing. Modules of the user's own are also found in the working
folder; they can never hide an installed package or one of ours.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from checkpoints_convert.nearest_name import nearest

__all__ = ["PlugInError", "PlugIns", "nearest"]

_IMPORT_PATH = re.compile(r"(?P<module>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):(?P<attribute>[A-Za-z_]\w*)")


class PlugInError(ValueError):
    """A plug-in that cannot be used: one line with the setting, its value and the reason."""

    def __init__(self, setting: str, value: object, reason: str, *, section: str | None = None) -> None:
        """section: given when the mistake may lie in any setting of that section."""
        super().__init__(f"{setting} = {value!r}: {reason}")
        self.setting = setting
        self.section = section


@dataclass(frozen=True, slots=True, kw_only=True)
class PlugIns:
    """What one setting may name."""

    setting: str  # such as reward.name
    options: str  # the section that holds the plug-in's options, such as reward
    known: Mapping[str, str]  # short name -> package.module:function

    def names(self, name: str) -> bool:
        """Whether this is a known name, or has the form of an import path."""
        return name in self.known or _IMPORT_PATH.fullmatch(name) is not None

    def load(self, name: str) -> Callable[..., Any]:
        """The callable behind a known name or an import path.

        Args:
            name: a key of `known`, or package.module:function. The module may lie in the working folder.

        Raises:
            PlugInError: the name is unknown, the module is missing or fails, or it holds no such callable.
        """
        path = self.known.get(name, name)
        parts = _IMPORT_PATH.fullmatch(path)
        if parts is None:
            raise PlugInError(self.setting, name, f"unknown; {nearest(name, self.known)}, or package.module:function")
        module = self._import(parts["module"], name)
        attribute = parts["attribute"]
        if not hasattr(module, attribute):
            place = getattr(module, "__file__", None) or "a folder without __init__.py"
            reason = f"module {module.__name__} ({place}) has no {attribute!r}; {nearest(attribute, _public(module))}"
            raise PlugInError(self.setting, name, reason)
        found = getattr(module, attribute)
        if not callable(found):
            raise PlugInError(self.setting, name, f"{attribute} is a {type(found).__name__}, expected a function or a class")
        return found

    def find(self, name: str, options: Mapping[str, Any], *, passed: int) -> Callable[..., Any]:
        """`load`, and a check that the callable takes these options: function(*passed_by_us, **options).

        Args:
            name: a key of `known`, or package.module:function.
            options: the plug-in's options as the configuration gives them.
            passed: how many arguments the program itself passes, by position.

        Raises:
            PlugInError: as `load`; and for an option that the callable does not have, or one that it needs.
        """
        function = self.load(name)
        self.check_options(name, function, options, passed=passed)
        return function

    def check_options(self, name: str, function: Callable[..., Any], options: Mapping[str, Any], *, passed: int) -> None:
        """Raises PlugInError unless function(*passed_by_us, **options) is a legal call. Arguments as in `find`."""
        known, takes_any = self._parameters(name, function, passed=passed)
        for option, value in options.items():
            if option not in known and not takes_any:
                raise PlugInError(f"{self.options}.{option}", value, f"{name} has no such option; {nearest(option, known)}")
        missing = [option for option, parameter in known.items() if parameter.default is parameter.empty and option not in options]
        if missing:
            raise PlugInError(self.setting, name, f"needs the option {', '.join(missing)}", section=self.options)

    def defaults(self, name: str, function: Callable[..., Any], *, passed: int) -> dict[str, Any]:
        """The options that have a default in the function's signature. Arguments as in `find`."""
        known, _ = self._parameters(name, function, passed=passed)
        return {option: parameter.default for option, parameter in known.items() if parameter.default is not parameter.empty}

    def refused(self, name: str, error: Exception) -> PlugInError:
        """What to raise when the plug-in itself rejects its options with `error`."""
        return PlugInError(self.setting, name, " ".join(str(error).split()) or type(error).__name__, section=self.options)

    def _import(self, module: str, name: str) -> ModuleType:
        _look_in_the_working_folder()
        importlib.invalidate_caches()  # the user may have written the file a moment ago
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is not None and f"{module}.".startswith(f"{error.name}."):
                reason = f"there is no module {error.name}, neither installed nor in the working folder {os.getcwd()}"
                raise PlugInError(self.setting, name, reason) from error
            raise PlugInError(self.setting, name, f"importing {module} failed: {error}") from error
        except Exception as error:  # a module of the user's own may raise anything
            raise PlugInError(self.setting, name, f"importing {module} failed: {type(error).__name__}: {error}") from error

    def _parameters(self, name: str, function: Callable[..., Any], *, passed: int) -> tuple[dict[str, inspect.Parameter], bool]:
        """The parameters that are options, and whether the function takes any other option too."""
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except ValueError as error:
            raise PlugInError(self.setting, name, f"has no signature that its options could be checked against ({error})") from error
        positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        if len(positional) < passed and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
            raise PlugInError(self.setting, name, f"takes {len(positional)} arguments by position, expected {passed} before its options")
        ours = {p.name for p in positional[:passed]}
        options = {p.name: p for p in parameters if p.name not in ours and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        return options, any(p.kind is p.VAR_KEYWORD for p in parameters)


class _WorkingFolder(importlib.abc.MetaPathFinder):
    """Finds top-level modules in the working folder, after every other finder has failed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.PathFinder.find_spec(fullname, [os.getcwd()]) if path is None else None


def _look_in_the_working_folder() -> None:
    if not any(isinstance(finder, _WorkingFolder) for finder in sys.meta_path):
        sys.meta_path.append(_WorkingFolder())


def _public(module: ModuleType) -> list[str]:
    return [name for name, value in vars(module).items() if callable(value) and getattr(value, "__module__", None) == module.__name__]
