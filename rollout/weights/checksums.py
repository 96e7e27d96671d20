"""Do the servers hold the trainer's weights? Checksums of both sides, comparable name by name.

SGLang's /weights_checker hashes each parameter as it holds it: q, k, v in one tensor, gate and up in one, all experts of a layer in two
([experts, 2 * width, hidden] with gate above up, and [experts, hidden, width]). `expected_checksums` hashes Hugging Face tensors in that
order as they stream by, without ever stacking them. On a CPU the hash is the first 8 bytes of SHA-256 over the raw bytes, row-major;
on CUDA SGLang uses another hash, so there the comparison is between servers, not with the trainer.
SGLang fills vocabularies up to a multiple of 64 rows, and on a CPU the width of feed-forward layers up to a multiple of 32, with zeros.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

import torch
from torch import Tensor

from rollout.sglang import control as sglang_control

VOCABULARY_MULTIPLE = 64
WIDTH_MULTIPLE = 32

_FUSED = (  # (pattern of the Hugging Face name, server's name, place of this part in the server's tensor)
    (re.compile(r"(.*\.self_attn\.)([qkv])_proj\.(weight|bias)"), r"\1qkv_proj.\3", lambda m: "qkv".index(m[2])),
    (re.compile(r"(.*\.mlp\.experts\.)(\d+)\.(gate|up)_proj\.weight"), r"\1w13_weight", lambda m: 2 * int(m[2]) + (m[3] == "up")),
    (re.compile(r"(.*\.mlp\.experts\.)(\d+)\.down_proj\.weight"), r"\1w2_weight", lambda m: int(m[2])),
    (re.compile(r"(.*\.mlp\.)(gate|up)_proj\.weight"), r"\1gate_up_proj.weight", lambda m: int(m[2] == "up")),
)


class ChecksumMismatch(RuntimeError):
    """A server's weights differ from the expected ones. Names the endpoint and the parameters."""


def server_parameter(hf_name: str) -> tuple[str, int]:
    """Where a Hugging Face tensor of Qwen3 or Qwen3-MoE lives in a server (tp=1): (parameter name, place among its parts)."""
    for pattern, name, place in _FUSED:
        match = pattern.fullmatch(hf_name)
        if match is not None:
            return match.expand(name), place(match)
    return hf_name, 0


def tensor_checksum(tensor: Tensor) -> str:
    """SGLang's checksum of one tensor on a CPU: 16 hex digits, first 8 bytes of SHA-256 over its bytes, row-major."""
    return _finish(_update(hashlib.sha256(), tensor))


def expected_checksums(tensors: Iterable[tuple[str, Tensor]], *, dtype: torch.dtype) -> dict[str, str]:
    """Checksums that a CPU server with tp=1 must report for these Hugging Face tensors: server parameter name -> checksum.

    tensors: streamed; a part is kept only until the parts before it have come. dtype: what the server computes in.
    Raises ValueError when a part of a fused parameter is missing or comes twice.
    """
    hashes: dict[str, hashlib._Hash] = {}
    next_place: dict[str, int] = {}
    waiting: dict[str, dict[int, Tensor]] = {}
    for hf_name, tensor in tensors:
        name, place = server_parameter(hf_name)
        parts = waiting.setdefault(name, {})
        if place in parts or place < next_place.get(name, 0):
            raise ValueError(f"expected_checksums: {hf_name} came twice")
        # A copy: the caller may reuse its buffer for the next tensor, while this part still waits for its turn.
        parts[place] = _as_held(hf_name, tensor.detach().to(dtype=dtype, copy=place != next_place.get(name, 0)))
        while next_place.get(name, 0) in parts:
            _update(hashes.setdefault(name, hashlib.sha256()), parts.pop(next_place.get(name, 0)))
            next_place[name] = next_place.get(name, 0) + 1
    gaps = sorted(name for name, parts in waiting.items() if parts)
    if gaps:
        raise ValueError(
            f"expected_checksums: part {next_place.get(gaps[0], 0)} of {gaps[0]} never came ({len(gaps)} parameters with gaps)"
        )
    return {name: _finish(hasher) for name, hasher in hashes.items()}


def server_checksums(
    endpoint: str, *, api_key: str | None = None, admin_key: str | None = None, timeout_s: float = 600.0
) -> list[dict[str, str]]:
    """What one server reports: for each of its tensor-parallel ranks, parameter name -> checksum.

    Takes the admin key, or the api key of a server without one; both are None for a server without keys.
    """
    key = sglang_control.control_key(api_key=api_key, admin_key=admin_key)
    answer = sglang_control.call(endpoint, "/weights_checker", {"action": "checksum"}, key=key, timeout_s=timeout_s)
    return [rank["checksums"] for rank in answer["ranks"]]


def check_equal(
    expected: dict[str, str], endpoint: str, *, api_key: str | None = None, admin_key: str | None = None, timeout_s: float = 600.0
) -> None:
    """Raises ChecksumMismatch unless the server (tp=1, CPU) holds exactly the expected weights, all of them. Keys: see server_checksums."""
    found = server_checksums(endpoint, api_key=api_key, admin_key=admin_key, timeout_s=timeout_s)
    if len(found) != 1:
        raise ValueError(f"{endpoint}: tp is {len(found)}; checksums can be compared with the trainer's only at tp 1")
    problems = [f"{name} differs" for name in sorted(expected.keys() & found[0].keys()) if expected[name] != found[0][name]]
    problems += [f"{name} is not in the server" for name in sorted(expected.keys() - found[0].keys() - _tied(expected, found[0]))]
    problems += [f"{name} was never sent" for name in sorted(found[0].keys() - expected.keys())]
    if problems:
        raise ChecksumMismatch(f"{endpoint}: {len(problems)} of {len(found[0])} parameters: {'; '.join(problems[:10])}")


def _tied(expected: dict[str, str], found: dict[str, str]) -> set[str]:
    """An output layer tied to the embedding is listed once by the server; sent twice, it must be the same tensor."""
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if head in expected and head not in found and expected[head] == found.get(embedding):
        return {head}
    return set()


def _as_held(hf_name: str, tensor: Tensor) -> Tensor:
    """The tensor with the zeros that SGLang's CPU engine puts around it."""
    module = hf_name.split(".")[-2]
    if module in ("embed_tokens", "lm_head"):
        return _filled_up(tensor, dim=0, multiple=VOCABULARY_MULTIPLE)
    if module in ("gate_proj", "up_proj"):
        return _filled_up(tensor, dim=0, multiple=WIDTH_MULTIPLE)
    if module == "down_proj":
        return _filled_up(tensor, dim=1, multiple=WIDTH_MULTIPLE)
    return tensor


def _filled_up(tensor: Tensor, *, dim: int, multiple: int) -> Tensor:
    lacking = -tensor.shape[dim] % multiple
    if lacking == 0:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = lacking
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim)


def _update(hasher: hashlib._Hash, tensor: Tensor) -> hashlib._Hash:
    if tensor.numel():
        hasher.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hasher


def _finish(hasher: hashlib._Hash) -> str:
    return hasher.digest()[:8].hex()
