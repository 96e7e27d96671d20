"""A module that is skipped for a while."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from parallel.skipped_import import skipped_import


def test_it_is_absent_inside_the_block_and_there_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "module_of_this_test.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    with skipped_import("module_of_this_test"), pytest.raises(ImportError):
        importlib.import_module("module_of_this_test")
    assert importlib.import_module("module_of_this_test").value == 1
    with skipped_import("module_of_this_test"):
        assert importlib.import_module("module_of_this_test").value == 1  # imported already: nothing is taken away
    monkeypatch.delitem(sys.modules, "module_of_this_test")
