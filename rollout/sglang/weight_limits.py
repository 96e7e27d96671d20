"""Server arguments with which SGLang's weight endpoints cannot do what the weight sync asks of them. Read in SGLang 0.5.23.

A server would start with any of them. The first publish would fail, hang, or reach a part of the server only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_REPLICAS = "the weight endpoints assert one replica; expected 1, and more rollout.servers"
_STAGES = "the stages of a pipeline would all take the same place in the weight sync's group; expected 1, and a larger rollout.tp"

# Name -> the only value that works, and why. SGLang's second names of an argument stand beside the first.
_LIMITS: dict[str, tuple[Any, str]] = {
    "dp_size": (1, _REPLICAS),
    "data_parallel_size": (1, _REPLICAS),
    "pp_size": (1, _STAGES),
    "pipeline_parallel_size": (1, _STAGES),
    "nnodes": (1, "a server is started on one node; expected 1"),
    "tokenizer_worker_num": (1, "only one of the HTTP workers would know the policy version; expected 1"),
    "weight_cache_mode": ("off", "cached weights refuse every update; expected off"),
    "enable_symm_mem": (False, "SGLang then sets NCCL_CUMEM_ENABLE=1 in its servers alone; expected false"),
    "enable_nccl_nvls": (False, "SGLang then sets NCCL_NVLS_ENABLE=1 in its servers alone; expected false, and that variable for the job"),
}


def check_weight_limits(options: Mapping[str, Any]) -> None:
    """Raises ValueError naming the first of the extra server arguments that the weight endpoints cannot honour."""
    given = {name.replace("-", "_"): (name, value) for name, value in options.items()}
    for key, (name, value) in given.items():
        if key not in _LIMITS:
            continue
        expected, why = _LIMITS[key]
        if key in ("dp_size", "data_parallel_size") and given.get("enable_dp_attention", ("", False))[1] is True:
            continue  # then it counts groups of attention inside one replica
        if str(value).lower() != str(expected).lower():
            raise ValueError(f"sglang.{name}: {value!r}: {why}")
