"""Plug-ins: known names, import paths, the working folder, and one line for everything that can be wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_minpro.registry import PlugInError, PlugIns

SHAPES = PlugIns(setting="shape.name", options="shape", known={"join": "os.path:join", "dumps": "json:dumps"})


def reason(name: str, options: dict[str, Any], *, passed: int = 0) -> str:
    with pytest.raises(PlugInError) as refusal:
        SHAPES.find(name, options, passed=passed)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_a_known_name_and_its_import_path_are_the_same_callable() -> None:
    assert SHAPES.load("dumps") is SHAPES.load("json:dumps") is json.dumps


def test_a_module_of_the_working_folder_is_found(users_module: Callable[[str], str]) -> None:
    name = users_module("import os\ndef area(width, *, height=2):\n    return width * height\n")
    assert SHAPES.find(f"{name}:area", {"height": 5}, passed=1)(3, height=5) == 15


def test_a_package_of_the_working_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "users_package_of_shapes").mkdir()
    (tmp_path / "users_package_of_shapes" / "flat.py").write_text("from users_package_of_shapes.sides import count as sides\n")
    (tmp_path / "users_package_of_shapes" / "sides.py").write_text("def count():\n    return 4\n")
    monkeypatch.chdir(tmp_path)
    assert SHAPES.load("users_package_of_shapes.flat:sides")() == 4


def test_the_working_folder_hides_neither_our_packages_nor_others(tmp_path: Path) -> None:
    for name in ("parallel", "rollout", "json", "yaml"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('the working folder was imported')\n")
    (tmp_path / "checkpoints_convert").mkdir()
    program = (
        "from megatron_minpro.registry import PlugIns\n"
        "shapes = PlugIns(setting='s', options='s', known={})\n"
        "paths = ['parallel.layout:ParallelLayout', 'rollout.records:SamplingParams', 'yaml:safe_load', 'json:dumps']\n"
        "for path in [*paths, 'checkpoints_convert.nearest_name:nearest', 'shape:Area']: shapes.load(path)\n"
    )
    (tmp_path / "shape.py").write_text("class Area: pass\n")
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "PYTHONSAFEPATH": "1"}
    ran = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_tables_import_nothing_until_a_name_is_used() -> None:
    lazy = PlugIns(setting="s", options="s", known={"absent": "no_such_module_at_all:f"})
    with pytest.raises(PlugInError, match=r"^s = 'absent': there is no module no_such_module_at_all, neither installed nor in the working"):
        lazy.load("absent")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("joins", "shape.name = 'joins': unknown; did you mean 'join'? known: join, dumps, or package.module:function"),
        ("os.path", "shape.name = 'os.path': unknown; known: join, dumps, or package.module:function"),
        (
            "json.decoders:f",
            "shape.name = 'json.decoders:f': there is no module json.decoders, neither installed nor in the working folder",
        ),
        ("json:dumb", "has no 'dumb'; did you mean 'dump'?"),
        ("json:__doc__", "shape.name = 'json:__doc__': __doc__ is a str, expected a function or a class"),
    ],
)
def test_a_name_that_leads_nowhere_says_which_setting_and_why(name: str, message: str) -> None:
    assert message in reason(name, {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import absent_dependency\n", "failed: No module named 'absent_dependency'"),
        ("1 / 0\n", "failed: ZeroDivisionError: division by zero"),
        ("def f(:\n", "failed: SyntaxError"),
    ],
)
def test_a_module_that_fails_to_import_says_why(users_module: Callable[[str], str], text: str, message: str) -> None:
    name = users_module(text)
    assert reason(f"{name}:f", {}).startswith(f"shape.name = '{name}:f': importing {name} ")
    assert message in reason(f"{name}:f", {})


def test_options_are_checked_against_the_signature(users_module: Callable[[str], str]) -> None:
    path = (
        users_module("def area(width, scale, *, height, unit='m'):\n    return width\ndef free(width, **more):\n    return more\n")
        + ":area"
    )
    SHAPES.find(path, {"height": 1}, passed=2)
    SHAPES.find(path, {"height": 1, "scale": 2}, passed=1)
    SHAPES.find(path.replace(":area", ":free"), {"anything": 1}, passed=1)
    assert (
        reason(path, {"heigth": 1}, passed=2) == f"shape.heigth = 1: {path} has no such option; did you mean 'height'? known: height, unit"
    )
    assert reason(path, {"width": 1, "height": 2}, passed=2).startswith("shape.width = 1: ")
    assert reason(path, {}, passed=2) == f"shape.name = '{path}': needs the option height"
    assert reason(path, {}, passed=3) == f"shape.name = '{path}': takes 2 arguments by position, expected 3 before its options"


def test_defaults_are_those_of_the_signature(users_module: Callable[[str], str]) -> None:
    path = users_module("class Area:\n    def __init__(self, width, *, height, unit='m'):\n        pass\n") + ":Area"
    assert SHAPES.defaults(path, SHAPES.load(path), passed=1) == {"unit": "m"}


def test_a_plug_in_that_rejects_its_options_is_named() -> None:
    error = SHAPES.refused("join", ValueError("height must be\npositive"))
    assert str(error) == "shape.name = 'join': height must be positive" and error.setting == "shape.name"
