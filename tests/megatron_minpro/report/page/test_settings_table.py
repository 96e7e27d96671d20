from __future__ import annotations

from pathlib import Path

import pytest

from megatron_minpro.config import flatten, load_config
from megatron_minpro.report.page.settings_table import Difference, nearest_shipped, shipped_settings, shown_settings


def test_the_differences_from_the_shipped_file_are_the_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config("tiny_moe_cpu", ["name=mine", "seed=7", f"output_dir={tmp_path}", "objective.clip_low=0.5"])
    monkeypatch.chdir(tmp_path)  # a report may be written from another folder than the run
    found = nearest_shipped(flatten(config), shipped_settings())
    assert found is not None and found.name == "tiny_moe_cpu"
    assert found.differences == (
        Difference(key="seed", value="7", shipped="0"),
        Difference(key="objective.clip_low", value="0.5", shipped="1.0"),
    )


def test_a_setting_that_one_side_lacks_is_a_difference() -> None:
    found = nearest_shipped({"name": "x", "old": 1}, {"a": {"name": "a", "new": None}})
    assert found is not None
    assert found.differences == (Difference(key="old", value="1", shipped="—"), Difference(key="new", value="—", shipped="null"))
    assert nearest_shipped({}, {"a": {}}) is None


def test_settings_are_shown_as_in_a_file_and_without_controls() -> None:
    shown = shown_settings({"a": None, "b": True, "c": [1, 2], "d": "\x1b" + "x" * 400})
    assert shown[:3] == [("a", "null"), ("b", "true"), ("c", "[1, 2]")]
    assert shown[3][1].startswith("␛xx") and shown[3][1].endswith("(101 more characters)")
