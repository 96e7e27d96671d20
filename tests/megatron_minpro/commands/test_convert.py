"""minpro convert: exit codes, one line, JSON for programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_minpro import cli
from megatron_minpro.commands.byte_size import parse_size
from tests.checkpoints_convert.small_models import MOE, random_weights, write_model


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_model(tmp_path / "hf", MOE, random_weights(MOE), max_shard_bytes=40_000)
    return tmp_path / "hf"


def test_there_and_back_and_verified(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    megatron, back = str(tmp_path / "megatron"), str(tmp_path / "back")
    assert cli.run(["convert", "hf-to-megatron", str(source), megatron, "--workers", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["num_tensors"], report["resumed_tensors"], report["destination"]) == (66, 0, megatron)
    assert report["gb_per_s"] > 0
    assert cli.run(["convert", "megatron-to-hf", megatron, back, "--shard-size", "40KB"]) == 0
    assert "66 tensors" in capsys.readouterr().out
    assert cli.run(["convert", "verify", str(source), back]) == 0
    assert cli.run(["convert", "verify", megatron]) == 0
    assert capsys.readouterr().out.startswith("equal: 66 tensors")
    assert cli.run(["convert", "inspect", megatron, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "torch_dist"


def test_a_difference_is_exit_code_1_and_wrong_input_2(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "other", MOE, random_weights(MOE, seed=1))
    assert cli.run(["convert", "verify", str(source), str(tmp_path / "other")]) == 1
    assert "66 of 66 tensors differ, the first: " in capsys.readouterr().err
    assert cli.run(["convert", "verify", str(source), str(tmp_path / "nowhere")]) == 2
    assert cli.run(["convert", "hf-to-megatron", str(source), str(tmp_path / "other")]) == 2
    assert cli.run(["convert", "megatron-to-hf", str(tmp_path / "other"), str(tmp_path / "x"), "--shard-size", "4 apples"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("minpro: error: ") for line in lines)


def test_dry_run_on_the_real_index_tells_files_bytes_and_time(assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["convert", "hf-to-megatron", str(assets / "models/qwen3_30b_a3b"), str(tmp_path / "out"), "--dry-run"]
    assert cli.run([*command, "--json"]) == 0
    preview = json.loads(capsys.readouterr().out)
    assert (preview["num_tensors"], preview["num_bytes"], preview["num_parameters"]) == (18_867, 61_064_245_248, 30_532_122_624)
    assert 61_064_245_248 < sum(preview["files"].values()) < 1.001 * 61_064_245_248
    assert preview["estimate_s"] == pytest.approx(preview["num_bytes"] / 1e9 / preview["gb_per_s"])
    assert cli.run(command) == 0
    assert "18,867 tensors" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_dry_run_refuses_an_index_of_another_model(assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    index = json.loads((assets / "models/qwen3_30b_a3b/model.safetensors.index.json").read_bytes())
    del index["weight_map"]["model.layers.7.mlp.experts.9.up_proj.weight"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_bytes((assets / "models/qwen3_30b_a3b/config.json").read_bytes())
    assert cli.run(["convert", "hf-to-megatron", str(folder), str(tmp_path / "out"), "--dry-run"]) == 2
    assert "missing 1: ['model.layers.7.mlp.experts.9.up_proj.weight']" in capsys.readouterr().err


def test_sizes_are_read_as_transformers_writes_them() -> None:
    assert [parse_size(text) for text in ("4GB", "500 MB", "2GiB", "40kb", "123")] == [4 * 10**9, 5 * 10**8, 2**31, 40_000, 123]
    for text in ("", "GB", "0", "-1GB", "1.5GB", "4TB"):
        with pytest.raises(ValueError, match="--shard-size"):
            parse_size(text)
