"""What a quantized Hugging Face folder must hold, checked tensor by tensor against the checkpoint that it was made from.

Two formats, as nvidia-modelopt 0.47 exports them and SGLang and vLLM read them, for every linear layer but the router and the head:
    fp8    weight [R, C] float8_e4m3fn, weight_scale [], input_scale []                  w = weight * weight_scale
    nvfp4  weight [R, C/2] uint8, weight_scale [R, C/16] float8_e4m3fn, weight_scale_2 [], input_scale []
           two e2m1 numbers a byte, the even column in the low half                      w = e2m1 * weight_scale * weight_scale_2
"""

# Shapes: R rows, C columns, B blocks of 16 columns.

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import torch
from torch import Tensor

from checkpoints_convert.hf_config import Architecture
from checkpoints_convert.mapping import Parameter, Split, parameters
from checkpoints_convert.safetensors_io import SafetensorsReader

_BLOCK = 16
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
_E4M3_MAX, _E2M1_MAX = 448.0, 6.0


class Format(StrEnum):
    """Number format of the quantized weights and activations."""

    FP8 = "fp8"
    NVFP4 = "nvfp4"


SUFFIXES: Mapping[Format, tuple[str, ...]] = {
    Format.FP8: ("weight", "weight_scale", "input_scale"),
    Format.NVFP4: ("weight", "weight_scale", "weight_scale_2", "input_scale"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightError:
    """What quantization did to the weights. relative_error: root mean square of the change over that of the quantized weights."""

    quantized_tensors: int
    kept_tensors: int
    source_bytes: int
    quantized_bytes: int
    relative_error: float


def dequantize(tensors: Mapping[str, Tensor], number_format: Format) -> Tensor:
    """float32 [R, C] from a layer's stored tensors, keyed by SUFFIXES. Source: the formulas in the module docstring."""
    if number_format is Format.FP8:
        return tensors["weight"].float() * tensors["weight_scale"].float()
    packed_RC = tensors["weight"]
    digits_RC = torch.stack([packed_RC & 15, packed_RC >> 4], dim=-1).flatten(-2)
    scale_RB = tensors["weight_scale"].float() * tensors["weight_scale_2"].float()
    return _E2M1[digits_RC.int()] * scale_RB.repeat_interleave(_BLOCK, dim=-1)


def is_quantized(parameter: Parameter) -> bool:
    """Whether both formats quantize a parameter: attention projections, feed-forward layers, experts; not router, head or norms."""
    return parameter.layer is not None and parameter.split is not Split.REPLICATED


def check_quantized(
    source: SafetensorsReader,
    directory: Path,
    architecture: Architecture,
    number_format: Format,
    *,
    progress: Callable[[int, int], None],
) -> WeightError:
    """Compare every tensor of a quantized folder with the checkpoint it was made from; memory for one layer's matrix.

    Kept tensors must be equal in every bit; quantized ones must lie within their format's rounding of the source, with scales that
    the source's largest weight explains, so a permuted expert, exchanged gate and up rows or an uncalibrated scale are found.
    progress(done, total) counts the source's tensors. Raises RuntimeError naming file and tensor.
    """
    change = size = 0.0
    counts = {True: 0, False: 0}
    with SafetensorsReader(directory) as quantized:
        _check_names(quantized, architecture, number_format, directory)
        total = sum(len(parameter.hf_names) for parameter in parameters(architecture))
        for parameter in parameters(architecture):
            weights = [source.read(name) for name in parameter.hf_names]
            # Engines fuse these into one matrix with one scale; some exports already give them the common one.
            common = max(float(weight.abs().max()) for weight in weights)
            for name, weight in zip(parameter.hf_names, weights, strict=True):
                if is_quantized(parameter):
                    error, squares = _compare(quantized, name, weight.float(), common, number_format)
                    change, size = change + error, size + squares
                elif not torch.equal(_bits(quantized.read(name)), _bits(weight)):
                    raise RuntimeError(f"{quantized.file(name)}: tensor {name!r} differs from the source's; expected it unchanged")
                counts[is_quantized(parameter)] += 1
                progress(sum(counts.values()), total)
        quantized_bytes = sum(quantized.spec(name).num_bytes for name in quantized.names)
    return WeightError(
        quantized_tensors=counts[True],
        kept_tensors=counts[False],
        source_bytes=sum(source.spec(name).num_bytes for name in source.names),
        quantized_bytes=quantized_bytes,
        relative_error=math.sqrt(change / size) if size else 0.0,
    )


def _expected_names(architecture: Architecture, number_format: Format) -> Iterator[str]:
    for parameter in parameters(architecture):
        for name in parameter.hf_names:
            if is_quantized(parameter):
                yield from (f"{name.removesuffix('weight')}{suffix}" for suffix in SUFFIXES[number_format])
            else:
                yield name


def _check_names(quantized: SafetensorsReader, architecture: Architecture, number_format: Format, directory: Path) -> None:
    expected = set(_expected_names(architecture, number_format))
    found = set(quantized.names)
    if expected != found:
        missing, extra = sorted(expected - found), sorted(found - expected)
        raise RuntimeError(
            f"{directory}: the export holds other tensors than {number_format} of this model; "
            f"missing {len(missing)}: {missing[:3]}, not known {len(extra)}: {extra[:3]}"
        )


def _compare(quantized: SafetensorsReader, name: str, weight_RC: Tensor, common: float, number_format: Format) -> tuple[float, float]:
    """Sums of squares of the change and of the weights. common: the largest weight of all that an engine fuses with this one."""
    stem = name.removesuffix("weight")
    tensors = {suffix: quantized.read(stem + suffix) for suffix in SUFFIXES[number_format]}
    where = f"{quantized.file(name)}: tensor"
    tensor_scale, largest_number = ("weight_scale", _E4M3_MAX) if number_format is Format.FP8 else ("weight_scale_2", _E4M3_MAX * _E2M1_MAX)
    for suffix in (tensor_scale, "input_scale"):
        if tensors[suffix].numel() != 1 or not 0 < float(tensors[suffix]) < math.inf:
            raise RuntimeError(f"{where} {stem + suffix!r} is {tensors[suffix].tolist()}; expected one positive number")
    scale = float(tensors[tensor_scale])
    expected = [largest / largest_number for largest in (float(weight_RC.abs().max()), common)]
    if not any(math.isclose(scale, value, rel_tol=0.01) for value in expected):
        raise RuntimeError(f"{where} {stem + tensor_scale!r} is {scale:.6g}; expected {expected[0]:.6g} or {expected[1]:.6g}")
    restored_RC = dequantize(tensors, number_format)
    if restored_RC.shape != weight_RC.shape:
        raise RuntimeError(f"{where} {name!r} stands for shape {tuple(restored_RC.shape)}; expected {tuple(weight_RC.shape)}")
    if number_format is Format.FP8:
        # Half a step of 3 mantissa bits, or of the smallest numbers; 15 % more for the source dtype's own rounding of w / scale.
        bound_RC = 1.15 * (weight_RC.abs() / 16).clamp(min=scale / 1024)
    else:
        # Half the widest step of e2m1 (4 to 6) is a sixth of the block's largest number; the block's scale is off by up to 1/16.
        largest_RB = weight_RC.unflatten(-1, (-1, _BLOCK)).abs().amax(-1)
        bound_RC = (largest_RB / 4).clamp(min=_E2M1_MAX * scale / 512).repeat_interleave(_BLOCK, dim=-1)
    change_RC = restored_RC - weight_RC
    if not bool((change_RC.abs() <= bound_RC).all()):  # NaN is not <= either
        worst = int((change_RC.abs() / bound_RC).nan_to_num(math.inf).argmax())
        found, given, bound = (float(tensor.flatten()[worst]) for tensor in (restored_RC, weight_RC, bound_RC))
        raise RuntimeError(
            f"{where} {name!r} holds {found:.6g} where the source has {given:.6g}; expected at most {bound:.3g} apart in {number_format}"
        )
    return float(change_RC.square().sum(dtype=torch.float64)), float(weight_RC.square().sum(dtype=torch.float64))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
