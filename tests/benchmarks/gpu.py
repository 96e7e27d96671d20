"""`make bench-gpu`: what only a GPU can show. Prints a line each, writes gpu.json with the date and the device's name.

parity         log-probs and MinPRO gradients of the actor in fp32 against transformers on the same device
scan           the prefix scan against twice the time that its bytes take at the memory bandwidth measured beside it
log-prob head  forward and backward against the four bare matrix products, peak memory
actor step     4 layers of Qwen3-30B-A3B's shape in bf16: TFLOP/s, peak memory

Without CUDA it says so and measures nothing. --smoke runs everything in tiny on whatever device there is: it checks this program.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from actor import SMALL, build_actor, make_sequences, start_alone, write_model
from torch import Tensor

from checkpoints_convert.hf_config import Architecture, read_architecture
from checkpoints_convert.mapping import hf_shapes, parameters
from checkpoints_convert.safetensors_io import SafetensorsReader
from megatron_minpro.loop.update import make_loss_function
from megatron_minpro.objectives import make_objective
from parallel import process_groups
from parallel.capabilities import Capabilities, detect
from parallel.logprobs import token_logprobs
from parallel.prefix_scan import PrefixMin, scan
from parallel.sequence_shard import SequenceShard

QWEN3_30B_A3B_IN_4_LAYERS = {
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}
_FIXED = {
    "model_type": "qwen3_moe",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "max_position_embeddings": 40_960,
    "tie_word_embeddings": False,
}
# fp32 products of another library in another order, over a few layers.
PARITY_TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Scale:
    """copy_bytes: of the buffer whose copy gives the memory bandwidth. head: tokens, hidden size, vocabulary. step: sequences, length."""

    scan_lengths: tuple[int, ...]
    copy_bytes: int
    head: tuple[int, int, int]
    chunk_tokens: int
    shape: Mapping[str, int]
    step: tuple[int, int]
    repeats: int


FULL = Scale(
    scan_lengths=(32_768,) * 32,
    copy_bytes=1 << 30,
    head=(8192, 2048, 151_936),
    chunk_tokens=1024,
    shape=QWEN3_30B_A3B_IN_4_LAYERS,
    step=(8, 1024),
    repeats=10,
)
TINY = Scale(scan_lengths=(64,) * 4, copy_bytes=1 << 16, head=(64, 32, 96), chunk_tokens=16, shape=SMALL, step=(4, 32), repeats=2)


def parity(groups: process_groups.ProcessGroups, capabilities: Capabilities) -> dict[str, Any]:
    """Largest relative errors against transformers, fp32 with TF32 off. Raises RuntimeError beyond the tolerance."""
    torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.device(capabilities.device_type)
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder), SMALL).to(device)
        architecture = read_architecture(Path(folder))
        with SafetensorsReader(Path(folder)) as reader:
            actor = build_actor(architecture, groups, capabilities, reader.read, dtype=torch.float32, max_tokens=4096, gradient_clip=1e9)
    token_ids = torch.randint(0, SMALL["vocab_size"], (4, 65))
    sequences = make_sequences(token_ids)
    logits = model(token_ids[:, :-1].to(device)).logits
    expected = logits.log_softmax(-1).gather(2, token_ids[:, 1:, None].to(device))[..., 0]
    scored = torch.stack(actor.logprobs(sequences)).to(device)

    # MinPRO by its formula (arXiv:2601.22718): ratio times the smallest earlier ratio, clipped to [0, 5], not differentiated.
    behaviour, advantages = (torch.stack([s.streams[name] for s in sequences]).to(device) for name in ("behaviour_logprobs", "advantages"))
    log_ratio = expected.detach() - behaviour
    earlier = torch.cat([torch.zeros_like(log_ratio[:, :1]), log_ratio.cummin(1).values[:, :-1]], dim=1)
    weights = (log_ratio + earlier).exp().clamp(max=5.0)
    (-(weights * advantages * expected).sum() / expected.numel()).backward()
    theirs = dict(_gradients(model))

    actor.update(sequences, make_loss_function(make_objective("minpro")), learning_rate=0.0)
    gradient_error = 0.0
    for parameter in parameters(architecture):
        ours = parameter.to_hf(actor._local[parameter.megatron_name].main_grad)
        for name, gradient in zip(parameter.hf_names, ours, strict=True):
            gradient_error = max(gradient_error, _relative(gradient, theirs[name]))
    errors = {"logprobs": _relative(scored, expected.detach()), "gradients": gradient_error}
    if not max(errors.values()) < PARITY_TOLERANCE:
        raise RuntimeError(f"parity with transformers: largest relative errors {errors}, expected below {PARITY_TOLERANCE}")
    return {"name": "parity, fp32, largest relative error", **errors}


def _gradients(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Under the names of a checkpoint; transformers holds all experts of a layer in one tensor."""
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        prefix, kind = name.rsplit(".", 1)
        if kind not in ("gate_up_proj", "down_proj"):
            yield name, parameter.grad
            continue
        for expert, gradient in enumerate(parameter.grad):
            parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
            for part, piece in zip(parts, gradient.chunk(len(parts)), strict=True):
                yield f"{prefix}.{expert}.{part}.weight", piece


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max().clamp(min=1e-30))


def prefix_scan(scale: Scale, device: torch.device) -> dict[str, Any]:
    """Bytes: a number and a mask in, a number out, for every token."""
    shard = SequenceShard.whole(scale.scan_lengths).to(device)
    x_T = torch.randn(shard.num_local_tokens, device=device)
    mask_T = torch.rand(shard.num_local_tokens, device=device) < 0.9
    source = torch.zeros(scale.copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * scale.copy_bytes / _seconds(lambda: target.copy_(source), scale, device)
    found = _seconds(lambda: scan(shard, [PrefixMin(x_T, mask_T)]), scale, device)
    limit = 9 * shard.num_local_tokens / bandwidth
    return {
        "name": f"prefix-min scan, {shard.num_local_tokens:,} tokens",
        "seconds": found,
        "limit_seconds": limit,
        "ratio": found / limit,
        "target": 2.0,
        "bandwidth_bytes_per_s": bandwidth,
    }


def logprob_head(scale: Scale, device: torch.device) -> dict[str, Any]:
    """Forward and backward with entropy, bf16, against the four matrix products that it must do."""
    num_tokens, hidden_size, vocab_size = scale.head
    hidden = torch.randn(num_tokens, hidden_size, device=device, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(vocab_size, hidden_size, device=device, dtype=torch.bfloat16).mul_(hidden_size**-0.5).requires_grad_()
    labels = torch.randint(0, vocab_size, (num_tokens,), device=device)

    def head() -> None:
        logprobs, _ = token_logprobs(
            hidden,
            weight,
            labels,
            vocab_size=vocab_size,
            temperature=1.0,
            tp_group=None,
            chunk_tokens=scale.chunk_tokens,
            with_entropy=True,
        )
        torch.autograd.grad(logprobs.sum(), (hidden, weight))

    bare = _seconds_of_products(hidden.detach(), weight.detach(), scale, device)
    found, peak = _seconds(head, scale, device), _peak_bytes(head, device)
    return {
        "name": f"log-prob head and entropy, bf16, {num_tokens:,} x {hidden_size:,} x {vocab_size:,}, forward and backward",
        "seconds": found,
        "limit_seconds": bare,
        "ratio": found / bare,
        "target": 1.25,
        "tflops_per_s": 4 * 2 * num_tokens * hidden_size * vocab_size / found / 1e12,
        "peak_bytes": peak,
        "logits_bytes": 4 * num_tokens * vocab_size,
    }


def _seconds_of_products(hidden: Tensor, weight: Tensor, scale: Scale, device: torch.device) -> float:
    grad = torch.randn(len(hidden), len(weight), device=device, dtype=hidden.dtype)
    products = ((hidden, weight.T), (hidden, weight.T), (grad, weight), (grad.T, hidden))
    return _seconds(lambda: [a @ b for a, b in products], scale, device)


def actor_step(scale: Scale, groups: process_groups.ProcessGroups, capabilities: Capabilities) -> dict[str, Any]:
    """One optimizer step in bf16 on random weights."""
    device = torch.device(capabilities.device_type)
    architecture = Architecture.from_config({**_FIXED, **scale.shape}, source="tests/benchmarks/gpu.py")
    shapes = hf_shapes(architecture)

    def read(name: str) -> Tensor:
        shape = shapes[name]
        return torch.ones(shape, dtype=torch.bfloat16) if len(shape) == 1 else torch.randn(shape, device=device).mul_(0.02).bfloat16()

    num_sequences, length = scale.step
    actor = build_actor(architecture, groups, capabilities, read, dtype=torch.bfloat16, max_tokens=num_sequences * length)
    sequences = make_sequences(torch.randint(0, architecture.vocab_size, (num_sequences, length + 1)))
    loss_fn = make_loss_function(make_objective("minpro"))

    def step() -> None:
        actor.update(sequences, loss_fn, learning_rate=1e-6)

    found, peak = _seconds(step, scale, device), _peak_bytes(step, device)
    return {
        "name": f"actor step, bf16, {num_sequences} x {length:,} tokens, {architecture.num_hidden_layers} layers",
        "shape": dict(scale.shape),
        "layers": capabilities.describe_layers(),
        "seconds": found,
        "tokens_per_s": num_sequences * length / found,
        "tflops_per_s": flops_of_a_step(architecture, num_sequences, length) / found / 1e12,
        "peak_bytes": peak,
    }


def flops_of_a_step(architecture: Architecture, num_sequences: int, length: int) -> int:
    """Useful ones: two per weight and token, three times (forward and both gradients); attention over half of each square.

    What is computed twice (logits) or besides (softmax, norms, the optimizer) counts as time, not as work.
    """
    a = architecture
    assert a.num_experts is not None and a.num_experts_per_tok is not None and a.moe_intermediate_size is not None
    attention = a.hidden_size * a.head_dim * (2 * a.num_attention_heads + 2 * a.num_key_value_heads)
    experts = a.hidden_size * (a.num_experts + 3 * a.num_experts_per_tok * a.moe_intermediate_size)
    scores_and_values = a.num_attention_heads * a.head_dim * length
    per_token = a.num_hidden_layers * (attention + experts + scores_and_values) + a.vocab_size * a.hidden_size
    return 2 * 3 * per_token * num_sequences * length


def _seconds(function: Callable[[], object], scale: Scale, device: torch.device) -> float:
    """Median wall seconds after two runs that warm up, the device's work included."""
    times = []
    for number in range(-2, scale.repeats):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number >= 0:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def _peak_bytes(function: Callable[[], object], device: torch.device) -> int | None:
    """Largest memory allocated during one call, everything that lives included; None where it cannot be known."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def _line(measured: Mapping[str, Any]) -> str:
    parts = [f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in measured.items() if key != "name"]
    return f"{measured['name']}: {', '.join(parts)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="gets gpu.json")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on the CPU too; the numbers mean nothing")
    arguments = parser.parse_args()
    capabilities = detect()
    if not capabilities.cuda_devices and not arguments.smoke:
        print(f"bench-gpu: no CUDA device (torch {capabilities.torch_version}); nothing measured")
        return
    scale = TINY if arguments.smoke else FULL
    device = torch.device(capabilities.device_type)
    torch.manual_seed(0)
    groups = start_alone(capabilities)
    measurements = []
    try:
        for measure in (
            lambda: parity(groups, capabilities),
            lambda: prefix_scan(scale, device),
            lambda: logprob_head(scale, device),
            lambda: actor_step(scale, groups, capabilities),
        ):
            measurements.append(measure())
            print(_line(measurements[-1]), flush=True)
    finally:
        process_groups.shut_down()
    arguments.out.mkdir(parents=True, exist_ok=True)
    machine = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": capabilities.device_name,
        "smoke": arguments.smoke,
        "capabilities": capabilities.lines(),
    }
    (arguments.out / "gpu.json").write_text(json.dumps({**machine, "measurements": measurements}, indent=2) + "\n")


if __name__ == "__main__":
    main()
