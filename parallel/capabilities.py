"""What this machine offers, and so which of two ways everything runs: the one file where CPU and GPU part.

Seen so far: gloo, the local layer spec and torch's own optimizer. Chosen from what is importable, never from an exception.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from typing import Literal

import torch


def _version(distribution: str, module: str) -> str | None:
    """Version of an installed distribution whose module can be found, else None."""
    if importlib.util.find_spec(module) is None:
        return None
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """Facts, then the choices that follow from them."""

    cuda_devices: int
    device_name: str
    torch_version: str
    megatron_core_version: str
    transformer_engine_version: str | None
    apex_version: str | None

    @property
    def device_type(self) -> Literal["cuda", "cpu"]:
        return "cuda" if self.cuda_devices else "cpu"

    @property
    def backend(self) -> Literal["nccl", "gloo"]:
        return "nccl" if self.cuda_devices else "gloo"

    @property
    def layer_spec(self) -> Literal["local"]:
        """Megatron-Core's local spec with this project's norm and attention, everywhere. TransformerEngine's is not in use yet."""
        return "local"

    def lines(self) -> list[str]:
        """For people: one fact and its consequence a line."""
        return [
            f"device: {self.device_name}, {self.cuda_devices} CUDA device(s); collectives over {self.backend}",
            f"torch {self.torch_version}, megatron-core {self.megatron_core_version}",
            f"TransformerEngine {self.transformer_engine_version or 'absent'}, Apex {self.apex_version or 'absent'}; "
            f"{self.layer_spec} layer spec",
        ]


def detect() -> Capabilities:
    """Look, without importing Megatron-Core or opening a CUDA context."""
    cuda_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return Capabilities(
        cuda_devices=cuda_devices,
        device_name=torch.cuda.get_device_name(0) if cuda_devices else "CPU",
        torch_version=torch.__version__,
        megatron_core_version=_version("megatron-core", "megatron") or "absent",
        transformer_engine_version=_version("transformer-engine", "transformer_engine"),
        # NVIDIA's Apex has amp_C kernels; the package of that name on the index has nothing to do with it.
        apex_version=_version("apex", "apex") if importlib.util.find_spec("amp_C") is not None else None,
    )
