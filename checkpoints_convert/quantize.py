"""fp8 and nvfp4 checkpoints of a Hugging Face folder, made by nvidia-modelopt and checked against the source before they appear.

transformers 5 keeps all experts of a layer in one stacked parameter and multiplies them in one kernel; modelopt only sees
torch.nn.functional.linear, one expert at a time. Therefore the model is loaded with its eager experts, for the reference too.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints_convert.atomic_directory import check_apart, check_destination, check_replaceable, new_directory
from checkpoints_convert.hf_config import config_with_both_spellings, read_architecture, read_config
from checkpoints_convert.logit_error import LogitError, LogitErrorSum
from checkpoints_convert.mapping import check_hf_tensors
from checkpoints_convert.quantized_weights import Format, WeightError, check_quantized
from checkpoints_convert.safetensors_io import SafetensorsReader

_POSITIONS_AT_ONCE = 256  # logits of 152k entries in float32: 160 MB
# What each format quantizes and how: modelopt's own recipes. Per tensor; router, head, norms and embedding stay as they are.
_RECIPES = {Format.FP8: "FP8_DEFAULT_CFG", Format.NVFP4: "NVFP4_DEFAULT_CFG"}

Progress = Callable[[str, int, int], None]  # what is being done, done so far, of how many


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeReport:
    """`logits` compares the quantized model (weights and activations) with the source on the measured prompts."""

    number_format: Format
    device: str
    calibration_prompts: int
    calibration_tokens: int
    measured_prompts: int
    measured_on_calibration: bool  # True: the error is that of the prompts calibrated on, so it flatters
    logits: LogitError
    weights: WeightError


def check_possible(number_format: Format, device: torch.device) -> None:
    """Raises ValueError, saying what to do, where modelopt is absent or the device cannot compute the format."""
    if importlib.util.find_spec("modelopt") is None:
        raise ValueError("nvidia-modelopt is not installed; expected it from: pip install 'megatron-minpro[quantize]'")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {str(device)!r}, but this machine offers no CUDA; expected 'cpu'")
    if number_format is Format.NVFP4 and device.type != "cuda":
        raise ValueError(
            f"nvfp4 needs CUDA (modelopt's activations are rounded in a CUDA kernel), device is {device}; expected cuda, or fp8"
        )


def check_quantizable(source: Path, destination: Path, *, number_format: Format, device: torch.device, replace: bool) -> torch.dtype:
    """What can be known before the model is loaded.

    Args:
        source: the Hugging Face folder.
        destination: the folder to write.
        number_format, device: see check_possible.
        replace: destination may be a checkpoint.

    Returns:
        The dtype of the weights.

    Raises:
        ValueError: naming the file, for a source that is not whole or no floating-point model, and a destination that cannot be written.
    """
    check_possible(number_format, device)
    check_apart(source, destination)
    if replace:
        check_replaceable(destination)
    check_destination(destination, replace=replace)
    architecture = read_architecture(source)
    with SafetensorsReader(source) as reader:
        check_hf_tensors(architecture, {name: reader.shape(name) for name in reader.names}, source=source)
        dtypes = {reader.dtype(name) for name in reader.names}
    if len(dtypes) != 1 or not (dtype := next(iter(dtypes))).is_floating_point or dtype.itemsize < 2:
        raise ValueError(f"{source}: weights are {sorted(map(str, dtypes))}; expected one of bfloat16, float16, float32 for all")
    return dtype


def quantize_checkpoint(
    source: str | Path,
    destination: str | Path,
    *,
    number_format: Format,
    calibration: Sequence[Sequence[int]],
    measured: Sequence[Sequence[int]],
    device: torch.device,
    max_shard_bytes: int,
    companions: Mapping[str, bytes],
    replace: bool,
    progress: Progress,
) -> QuantizeReport:
    """Write `destination`, a quantized copy of the Hugging Face folder `source` that SGLang and vLLM serve (quant_method modelopt).

    calibration: token ids of the prompts whose largest activations set the scales. measured: of those on which the logit error is
    measured; the same object means the calibration prompts. companions: tokenizer files and the like, name -> content.
    The whole model is in memory, in its own dtype. The folder appears whole or not at all, after every tensor was compared with the
    source. Raises ValueError for wrong input, RuntimeError for an export that is not what was asked for.
    """
    source, destination = Path(source), Path(destination)
    dtype = check_quantizable(source, destination, number_format=number_format, device=device, replace=replace)
    config = read_config(source)
    architecture = read_architecture(source)
    for name, prompts in (("calibration", calibration), ("measured", measured)):
        if not prompts or not all(prompts):
            raise ValueError(f"{source}: {name} prompts: {len(prompts)}, one may be empty; expected at least one, each with tokens")
    with SafetensorsReader(source) as reader, new_directory(destination, replace=replace) as temporary:
        logits = _calibrate_and_export(source, temporary, number_format, calibration, measured, device, dtype, max_shard_bytes, progress)
        weights = check_quantized(
            reader, temporary, architecture, number_format, progress=lambda done, total: progress("checking the export", done, total)
        )
        _complete_folder(temporary, config, companions)
    return QuantizeReport(
        number_format=number_format,
        device=str(device),
        calibration_prompts=len(calibration),
        calibration_tokens=sum(map(len, calibration)),
        measured_prompts=len(measured),
        measured_on_calibration=measured is calibration,
        logits=logits,
        weights=weights,
    )


def _calibrate_and_export(
    source: Path,
    directory: Path,
    number_format: Format,
    calibration: Sequence[Sequence[int]],
    measured: Sequence[Sequence[int]],
    device: torch.device,
    dtype: torch.dtype,
    max_shard_bytes: int,
    progress: Progress,
) -> LogitError:
    with contextlib.redirect_stdout(io.StringIO()):  # modelopt says what it wraps; stdout is the caller's, for JSON perhaps
        progress("loading", 0, 1)
        with warnings.catch_warnings():
            # modelopt imports what it may wrap, Megatron too, and every absent accelerator library warns once.
            warnings.simplefilter("ignore")
            import modelopt.torch.quantization as quantization
            from modelopt.torch.export import export_hf_checkpoint
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, experts_implementation="eager").to(device).eval()
        progress("loading", 1, 1)
        reference = _hidden_states(model, measured, "measuring the source", progress)
        head_VH: Tensor = model.lm_head.weight.detach()

        def calibrate(quantized: Any) -> None:
            for done, token_ids in enumerate(calibration, start=1):
                quantized.model(_one_row(token_ids, device), use_cache=False)
                progress("calibrating", done, len(calibration))

        with torch.no_grad():
            model = quantization.quantize(model, getattr(quantization, _RECIPES[number_format]), calibrate)
        compared = _hidden_states(model, measured, f"measuring {number_format}", progress)
        errors = LogitErrorSum()
        for token_ids, reference_TH, compared_TH in zip(measured, reference, compared, strict=True):
            next_tokens = torch.tensor(token_ids[1:], device=device)
            for start in range(0, len(token_ids), _POSITIONS_AT_ONCE):
                span = slice(start, start + _POSITIONS_AT_ONCE)
                errors.add(reference_TH[span].to(device) @ head_VH.T, compared_TH[span].to(device) @ head_VH.T, next_tokens[span])
        logits = errors.result()
        progress("exporting", 0, 1)
        export_hf_checkpoint(model, dtype=dtype, export_dir=directory, max_shard_size=max_shard_bytes)
        progress("exporting", 1, 1)
    return logits


def _hidden_states(model: Any, prompts: Sequence[Sequence[int]], what: str, progress: Progress) -> list[Tensor]:
    """[tokens, hidden] of each prompt after the final norm, on the CPU: the head stays unquantized, so the logits follow from them."""
    states = []
    for done, token_ids in enumerate(prompts, start=1):
        with torch.inference_mode():
            states.append(model.model(_one_row(token_ids, model.device), use_cache=False).last_hidden_state[0].cpu())
        progress(what, done, len(prompts))
    return states


def _one_row(token_ids: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([list(token_ids)], device=device)


def _complete_folder(directory: Path, config: Mapping[str, Any], companions: Mapping[str, bytes]) -> None:
    """The source's config, in both spellings, with what modelopt says about the quantization; tokenizer files."""
    exported = read_config(directory)
    if "quantization_config" not in exported:
        raise RuntimeError(f"{directory / 'config.json'}: quantization_config is missing from modelopt's export")
    complete = config_with_both_spellings(config) | {"quantization_config": exported["quantization_config"]}
    (directory / "config.json").write_text(json.dumps(complete, indent=2) + "\n", encoding="utf-8")
    for name, content in companions.items():
        (directory / name).write_bytes(content)
