"""A configuration by path or by shipped name."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_minpro.config import ConfigError, load_config
from megatron_minpro.config.shipped import find_config

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


def test_a_shipped_name_means_its_file_wherever_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny_moe_cpu").mkdir()  # a run folder of that name changes nothing
    assert find_config("tiny_moe_cpu") == CONFIGS / "tiny_moe_cpu.yaml"
    assert load_config("tiny_moe_cpu") == load_config(CONFIGS / "tiny_moe_cpu.yaml")
    monkeypatch.chdir(CONFIGS.parent)
    assert find_config("tiny_moe_cpu") == Path("configs/tiny_moe_cpu.yaml")


@pytest.mark.parametrize("name", ["mine.yaml", "folder/tiny_moe_cpu", "/tiny_moe_cpu", str(CONFIGS / "qwen3_8b.yaml")])
def test_a_suffix_or_a_folder_makes_it_a_path(name: str) -> None:
    assert find_config(name) == Path(name)


def test_an_unknown_name_is_one_line_with_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"^tiny_moe: no shipped configuration has this name; did you mean 'tiny_moe_cpu'\? known: qwen3"):
        load_config("tiny_moe")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^configs/qwen3_8b\.yaml: does not exist; did you mean the shipped configuration qwen3_8b\?$"):
        load_config("configs/qwen3_8b.yaml")
