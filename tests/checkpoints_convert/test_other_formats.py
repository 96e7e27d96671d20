"""A checkpoint that is not read is refused with a word on the files that lie there; buffers that are no weights are left alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints_convert.convert import hf_to_megatron
from checkpoints_convert.safetensors_io import SafetensorsReader
from megatron_minpro import cli
from tests.checkpoints_convert.small_models import MOE, random_weights, write_model


def make_model(folder: Path) -> Path:
    write_model(folder, MOE, random_weights(MOE))
    return folder


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["model-00001-of-00002.gguf"], "model-00001-of-00002.gguf: GGUF is not read; take the model's safetensors"),
        (["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"], "bin and 1 more: PyTorch pickles are not read; save"),
        (["consolidated.00.pth"], "consolidated.00.pth: PyTorch pickles are not read"),
        (["model-00001-of-00002.safetensors"], "safetensors files without model.safetensors.index.json"),
        (["training_args.bin"], "expected a folder with safetensors weights"),
    ],
)
@pytest.mark.parametrize("command", [["convert", "inspect"], ["convert", "hf-to-megatron"]])
def test_the_files_that_lie_there_are_named(
    names: list[str], words: str, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_model(tmp_path / "model")
    for path in folder.glob("model*"):
        path.unlink()
    for name in names:
        (folder / name).write_bytes(b"x")
    arguments = [*command, str(folder), *([str(tmp_path / "out")] if "hf-to-megatron" in command else [])]
    assert cli.run(arguments) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_a_gguf_file_is_named_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    for arguments in (["convert", "inspect", str(tmp_path / "m.gguf")], ["evaluate", str(tmp_path), "--benchmarks", "amc23", "--dry-run"]):
        assert cli.run(arguments) == 2
        assert "m.gguf: GGUF is not read" in capsys.readouterr().err


def test_rotary_buffers_are_no_weights(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    buffers = shutil.copytree(folder, tmp_path / "buffers")
    tensors = load_file(buffers / "model.safetensors")
    names = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(2)] + ["model.rotary_emb.inv_freq"]
    save_file({**tensors, **{name: torch.ones(8) for name in names}}, buffers / "model.safetensors", metadata={"format": "pt"})
    with SafetensorsReader(buffers) as reader:
        assert set(reader.names) == set(tensors)
    report = hf_to_megatron(buffers, tmp_path / "out", workers=1)
    assert report.num_tensors == len(tensors)


def test_a_runs_checkpoint_says_its_model_type(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = tmp_path / "run/checkpoints/step_000003"
    step.mkdir(parents=True)
    hf_to_megatron(make_model(tmp_path / "model"), step / "actor", workers=1)
    (step / "actor/config.json").unlink()
    (step / "run.json").write_text(json.dumps({"model": {"model_type": "qwen3_moe"}}))
    (tmp_path / "run/checkpoints/latest").write_text("step_000003")
    assert cli.run(["convert", "inspect", str(tmp_path / "run")]) == 0
    assert "model type: qwen3_moe\n" in capsys.readouterr().out


def test_a_model_type_that_nothing_names_is_said_to_be_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_model(tmp_path / "model")
    (folder / "config.json").unlink()
    assert cli.run(["convert", "inspect", str(folder)]) == 0
    assert "model type: not named (no config.json here)\n" in capsys.readouterr().out
