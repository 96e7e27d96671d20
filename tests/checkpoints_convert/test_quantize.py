from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints_convert import quantize
from checkpoints_convert.hf_config import config_with_both_spellings, read_architecture, read_config
from checkpoints_convert.logit_error import LogitErrorSum
from checkpoints_convert.quantized_weights import Format, check_quantized, dequantize
from checkpoints_convert.safetensors_io import SINGLE_FILE, SafetensorsReader
from megatron_minpro import cli
from megatron_minpro.tasks.arithmetic_chains.tokenizer import build_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
PROMPTS = [f"{row % 10} + {7 * row % 10} - {3 * row % 10} + {row % 4}" for row in range(10)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """moe/: Qwen3-MoE with its own head; dense/: Qwen3 with tied embeddings; both bfloat16. Their exports and reports beside them."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
    }
    experts = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
    folder = tmp_path_factory.mktemp("quantize")
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **experts, tie_word_embeddings=False)).bfloat16().save_pretrained(folder / "moe")
    Qwen3ForCausalLM(Qwen3Config(**shape, tie_word_embeddings=True)).bfloat16().save_pretrained(folder / "dense")
    for name in ("moe", "dense"):
        build_tokenizer(folder / name)
    rows = [{"task": {"text": prompt, "chat": [{"role": "user", "content": prompt}]}} for prompt in PROMPTS]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    process = Path(__file__).with_name("quantize_process.py")
    subprocess.run([sys.executable, str(process), str(folder)], check=True, cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return folder


def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def report(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"{name}_fp8.json").read_text())


def fake_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """Rounded to float8_e4m3fn and back, in the dtype of x."""
    return ((x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale).to(x.dtype)


def test_reported_error_is_that_of_the_written_files(folder: Path) -> None:
    # The dense model's files run in transformers, weights restored and inputs rounded by hooks: nothing of modelopt takes part.
    from transformers import AutoModelForCausalLM

    tokenizer = tokenizer_of(folder / "dense_fp8")
    files = load_file(folder / "dense_fp8" / SINGLE_FILE)
    plain = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.bfloat16)
    for name, module in model.named_modules():
        if f"{name}.weight_scale" in files:
            module.weight.data.copy_(files[f"{name}.weight"].float() * files[f"{name}.weight_scale"])
            scale = files[f"{name}.input_scale"]
            module.register_forward_pre_hook(lambda _, inputs, scale=scale: (fake_fp8(inputs[0], scale),))
    errors = LogitErrorSum()
    with torch.no_grad():
        for prompt in PROMPTS[7:]:
            row = torch.tensor([tokenizer(prompt).input_ids])
            errors.add(plain(row).logits[0], model(row).logits[0], row[0, 1:])
    expected, found = errors.result(), report(folder, "dense")["logits"]
    assert expected.vocabulary_mean > 0.01  # quantization does something here
    assert found["reference_nll"] == pytest.approx(expected.reference_nll, rel=1e-3)
    assert found["compared_nll"] == pytest.approx(expected.compared_nll, rel=2e-2)  # bfloat16 steps of a logit
    assert found["vocabulary_mean"] == pytest.approx(expected.vocabulary_mean, rel=0.1)
    assert found["kl"] == pytest.approx(expected.kl, rel=0.2)


@pytest.mark.parametrize("name", ["moe", "dense"])
def test_fp8_weights_are_the_nearest_fp8_numbers_of_the_source(name: str, folder: Path) -> None:
    source, files = load_file(folder / name / SINGLE_FILE), load_file(folder / f"{name}_fp8" / SINGLE_FILE)
    quantized = [key for key in source if f"{key}_scale" in files]
    assert len(quantized) == 2 * (4 + 3 * (4 if name == "moe" else 1)) == report(folder, name)["weights"]["quantized_tensors"]
    for key in quantized:
        assert files[key].dtype is torch.float8_e4m3fn
        assert files[key.replace("weight", "input_scale")] > 0
        ideal = (source[key].float() / files[f"{key}_scale"]).to(torch.float8_e4m3fn)
        # modelopt divides bfloat16 by bfloat16: quotients near the middle between two numbers may go to the other one, and no further.
        assert (ideal.float() != files[key].float()).float().mean() < 0.15
        assert (ideal.view(torch.uint8).int() - files[key].view(torch.uint8).int()).abs().max() <= 1
    for key in set(source) - set(quantized):
        assert torch.equal(source[key], files[key])


def test_gate_and_up_of_one_expert_share_a_scale(folder: Path) -> None:
    files = load_file(folder / "moe_fp8" / SINGLE_FILE)
    for layer in range(2):
        for expert in range(4):
            stem = f"model.layers.{layer}.mlp.experts.{expert}"
            assert files[f"{stem}.gate_proj.weight_scale"] == files[f"{stem}.up_proj.weight_scale"]


@pytest.mark.parametrize("name", ["moe", "dense"])
def test_config_says_modelopt_in_both_spellings(name: str, folder: Path) -> None:
    config = read_config(folder / f"{name}_fp8")
    quantization = config.pop("quantization_config")
    assert (quantization["quant_method"], quantization["quant_algo"]) == ("modelopt", "FP8")
    assert config == config_with_both_spellings(read_config(folder / name))
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert (folder / f"{name}_fp8" / "tokenizer.json").read_bytes() == (folder / name / "tokenizer.json").read_bytes()


def test_report_counts_prompts_tokens_and_bytes(folder: Path) -> None:
    found = report(folder, "moe")
    source = load_file(folder / "moe" / SINGLE_FILE)
    # 7 words, and what the chat template puts around them.
    template = len(
        tokenizer_of(folder / "moe").apply_chat_template([{"role": "user", "content": ""}], add_generation_prompt=True)["input_ids"]
    )
    tokens = 7 + template
    assert template > 0
    assert (found["calibration_prompts"], found["calibration_tokens"], found["measured_prompts"]) == (7, 7 * tokens, 3)
    assert not found["measured_on_calibration"]
    assert (found["logits"]["num_positions"], found["logits"]["num_next_tokens"]) == (3 * tokens, 3 * (tokens - 1))
    assert report(folder, "dense")["calibration_tokens"] == 49
    assert found["weights"]["source_bytes"] == sum(tensor.numel() * tensor.element_size() for tensor in source.values())
    assert 0.015 < found["weights"]["relative_error"] < 0.04  # evenly spread mantissas of 3 bits: 0.026


def exchange(first: str, second: str) -> Callable[[dict[str, Tensor]], None]:
    def spoil(tensors: dict[str, Tensor]) -> None:
        for suffix in ("weight", "weight_scale"):
            a, b = (f"model.layers.1.mlp.experts.{name}.{suffix}" for name in (first, second))
            tensors[a], tensors[b] = tensors[b], tensors[a]

    return spoil


def put(name: str, value: float) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__setitem__(f"model.layers.0.self_attn.{name}", torch.tensor(value))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (exchange("1.gate_proj", "1.up_proj"), "experts.1.gate_proj.weight' holds"),
        (exchange("0.down_proj", "2.down_proj"), "experts.0.down_proj.weight_scale' is"),
        (put("o_proj.weight_scale", 1.0), "o_proj.weight_scale' is 1; expected"),
        (put("o_proj.input_scale", math.nan), "o_proj.input_scale' is nan; expected one positive number"),
        (lambda tensors: tensors.pop("lm_head.weight"), "missing 1: ['lm_head.weight']"),
        (
            lambda tensors: tensors["model.norm.weight"].view(torch.uint8)[5:6].bitwise_xor_(1),
            "'model.norm.weight' differs",
        ),
    ],
)
def test_an_export_that_is_off_is_found(spoil: Any, message: str, folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "moe_fp8" / SINGLE_FILE)
    spoil(tensors)
    save_file(tensors, tmp_path / SINGLE_FILE)
    with SafetensorsReader(folder / "moe") as reader, pytest.raises(RuntimeError) as failure:
        check_quantized(reader, tmp_path, read_architecture(folder / "moe"), Format.FP8, progress=lambda *_: None)
    assert message in str(failure.value)


def test_nvfp4_numbers_by_hand() -> None:
    # Low half first: 0x21 is 0.5 (1) then 1.0 (2); 0xF7 is 6.0 (7) then -6.0 (15). Block scale 2, tensor scale 0.25.
    packed = torch.tensor([[0x21, 0xF7, 0, 0, 0, 0, 0, 0x90]], dtype=torch.uint8)
    tensors = {"weight": packed, "weight_scale": torch.tensor([[2.0]]).to(torch.float8_e4m3fn), "weight_scale_2": torch.tensor(0.25)}
    assert dequantize(tensors, Format.NVFP4).tolist() == [[0.25, 0.5, 3.0, -3.0] + 10 * [0.0] + [0.0, -0.25]]


def test_nvfp4_files_of_modelopt_pass_the_check(folder: Path) -> None:
    architecture = read_architecture(folder / "moe")
    with SafetensorsReader(folder / "moe") as reader:
        found = check_quantized(reader, folder / "moe_nvfp4", architecture, Format.NVFP4, progress=lambda *_: None)
    assert found.quantized_tensors == 32
    assert 0.05 < found.relative_error < 0.15
    assert found.quantized_bytes < 0.6 * found.source_bytes


def quantize_arguments(folder: Path, destination: Path) -> list[str]:
    prompts = ["--prompts", str(folder / "prompts.jsonl"), "--field", "task.text"]
    return ["convert", "quantize", str(folder / "moe"), str(destination), "--format", "fp8", *prompts]


def test_absent_modelopt_is_named_with_its_remedy(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "modelopt" else find_spec(name, *rest))
    assert cli.run(quantize_arguments(folder, tmp_path / "out")) == 2
    assert "pip install 'megatron-minpro[quantize]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, message",
    [
        ({"--format": "nvfp4"}, "nvfp4 needs CUDA"),
        ({"--field": "task.words"}, "field 'task.words' is missing"),
        ({"--field": "task"}, "prompts.jsonl: line 1: task is a dict; expected a text or a list of chat messages"),
        ({"--prompts": "absent.jsonl"}, "absent.jsonl': no such file"),
        ({"--prompts": "notes.txt"}, ".txt is not read; expected a .jsonl, .jsonl.gz, .json or .parquet file"),
        ({"--held-out": "10"}, "--held-out 10, but"),
        ({"--format": "int3"}, "int3"),
        ({"SRC": "absent"}, "absent: no such directory"),
        ({"SRC": "moe_fp8"}, "quantization_config is"),
        ({"DST": "moe/inside"}, "lies in or holds the source"),
        ({"DST": "."}, "lies in or holds the source"),
    ],
)
def test_wrong_input_is_one_line_and_nothing_is_written(
    change: dict[str, str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*quantize_arguments(folder, tmp_path / "out"), "--held-out", "3"]
    for option, value in change.items():
        position = {"SRC": 2, "DST": 3}.get(option) or arguments.index(option) + 1
        arguments[position] = str(folder / value) if option in ("SRC", "DST") else value
    assert cli.run(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_counts_prompts_and_writes_nothing(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*quantize_arguments(folder, tmp_path / "out"), "--held-out", "3", "--dry-run"]
    assert cli.run(arguments) == 0
    said = capsys.readouterr().out
    assert "would become" in said and "measured on 3" in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    assert cli.run(arguments) == 2
    assert "out: exists already; expected a new name, or the permission to replace it (--force)" in capsys.readouterr().err


def test_failed_export_leaves_nothing_behind(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_half(source: Path, directory: Path, *_: Any) -> None:
        (directory / SINGLE_FILE).write_bytes(b"half")
        raise RuntimeError("off")

    monkeypatch.setattr(quantize, "_calibrate_and_export", write_half)
    assert cli.run(quantize_arguments(folder, tmp_path / "out")) == 1
    assert list(tmp_path.iterdir()) == []
