"""Server arguments with which SGLang cannot return the experts that tokens visited, or returns others. Read in SGLang 0.5.23.

A server keeps them in a buffer of one forward pass (`state_capturer/`) and then beside its key-value cache, slot by slot.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

MOE_RUNNER = "triton"  # the one for bfloat16 on CUDA whose routers are asked before the capture; SGLang's own choice depends on the GPU


def _is_on(value: str) -> bool:
    return value not in ("false", "none", "null")


_CACHE = "experts do not follow keys and values into a second cache; expected false"

# Name -> whether a value (as lower-case text) is refused, and why.
_LIMITS: dict[str, tuple[Callable[[str], bool], str]] = {
    "enable_return_routed_experts": (lambda value: value != "true", "expected true, or no such key"),
    "chunked_prefill_size": (
        lambda value: not value.isdigit() or value == "0",
        "a longer prefill than the buffer of a chunk's experts ends the server; expected a positive number",
    ),
    "enable_hierarchical_cache": (_is_on, _CACHE),
    "enable_lmcache": (_is_on, _CACHE),
    "enable_flexkv": (_is_on, _CACHE),
    "speculative_algorithm": (_is_on, "the buffer has no room for drafted tokens; expected no such key"),
    "disaggregation_mode": (_is_on, "experts of the prompt stay in another server; expected null"),
    "enable_two_batch_overlap": (_is_on, "both halves of a batch write to one place of the buffer; expected false"),
    "enable_pdmux": (_is_on, "prefill and decode would share the buffer; expected false"),
    "moe_runner_backend": (lambda value: value != MOE_RUNNER, f"others may choose experts inside their kernels; expected {MOE_RUNNER}"),
}


def check_route_limits(options: Mapping[str, Any]) -> None:
    """Raises ValueError naming the first of the extra server arguments that returned experts cannot stand."""
    for name, value in options.items():
        is_refused, why = _LIMITS.get(name.replace("-", "_"), (None, ""))
        if value is not None and is_refused is not None and is_refused(str(value).lower()):  # null is refused for every option
            raise ValueError(f"sglang.{name} = {value!r}: {why}")
