"""Names of tests are read in reports a line wide."""

from __future__ import annotations

import ast
from pathlib import Path

LONGEST = 70


def test_a_name_of_a_test_has_at_most_70_characters() -> None:
    names = {
        f"{path.name}: {node.name}"
        for path in Path(__file__).parent.rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    }
    assert len(names) > 1000  # it looks in the right place
    assert sorted(name for name in names if len(name.partition(": ")[2]) > LONGEST) == []
