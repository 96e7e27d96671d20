"""A module that is imported when it is first used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rollout.deferred_module import defer

SLOW = "package_of_this_test.slow"
SOURCES = {
    "__init__": "",
    "slow": "class Refused(Exception): ...\n\ndef refuse(what, *, loudly):\n    raise Refused(f'{what}{loudly}')\n\nlimit = 7\n",
    "user": (
        f"from {SLOW} import Refused, refuse\n\ndef ask(what):\n    try:\n        refuse(what, loudly='!')\n"
        "    except Refused as refusal:\n        return str(refusal)\n"
    ),
}


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Imports a module of the package, of which `slow` is deferred."""
    folder = tmp_path / "package_of_this_test"
    folder.mkdir()
    for name, source in SOURCES.items():
        (folder / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module(folder.name)
    defer(SLOW, functions=("refuse",), exceptions=("Refused",))
    yield lambda name: importlib.import_module(f"{folder.name}.{name}")
    for name in [name for name in sys.modules if name.startswith(folder.name)]:
        del sys.modules[name]


def is_imported() -> bool:
    return hasattr(sys.modules[SLOW], "__file__")


def test_the_first_call_imports_it_and_its_exception_is_caught(module: Callable[[str], Any]) -> None:
    user = module("user")
    assert not is_imported()
    assert user.ask("no") == "no!"
    assert is_imported()
    slow = module("slow")
    assert (user.refuse, user.Refused) == (slow.refuse, slow.Refused) and slow is sys.modules["package_of_this_test"].slow
    assert user.ask("never") == "never!"


def test_any_other_name_imports_it_at_once(module: Callable[[str], Any]) -> None:
    user = module("user")
    deferred = module("slow")
    assert not is_imported()
    assert deferred.limit == 7
    assert is_imported() and user.Refused is sys.modules[SLOW].Refused is deferred.Refused
    with pytest.raises(AttributeError, match="absent"):
        _ = deferred.absent


def test_what_is_imported_already_stays(module: Callable[[str], Any]) -> None:
    assert module("slow").limit == 7
    real = sys.modules[SLOW]
    defer(SLOW, functions=("refuse",))
    assert sys.modules[SLOW] is real


def test_a_module_of_a_deferred_package_imports_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "outer_of_this_test/inner"
    inner.mkdir(parents=True)
    for path, source in ((inner.parent, ""), (inner, "held = 3\n")):
        (path / "__init__.py").write_text(source)
    (inner / "leaf.py").write_text("from outer_of_this_test.inner import held\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("outer_of_this_test")
    defer("outer_of_this_test.inner", package=True)
    assert not hasattr(sys.modules["outer_of_this_test.inner"], "__file__")
    assert importlib.import_module("outer_of_this_test.inner.leaf").held == 3
    assert sys.modules["outer_of_this_test.inner"].held == 3
