"""What this machine offers. This file alone decides what differs between CPU and GPU.

Seen so far: gloo, the local layer spec and torch's own optimizer. Never run: TransformerEngine's layer spec. Chosen from what is
importable, never from an exception.
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
    def layer_spec(self) -> Literal["transformer_engine", "local"]:
        """TransformerEngine's where it can be imported and CUDA is there; else Megatron-Core's local one with this project's plug-ins."""
        return "transformer_engine" if self.cuda_devices and self.transformer_engine_version is not None else "local"

    @property
    def expert_product(self) -> Literal["grouped", "loop"]:
        """How `experts.py` multiplies. On a CPU the loop is the faster one (make bench)."""
        return "grouped" if self.cuda_devices else "loop"

    def describe_layers(self) -> str:
        """Which layers the model is made of."""
        if self.layer_spec == "transformer_engine":
            return f"TransformerEngine {self.transformer_engine_version}'s layer spec"
        return f"the local layer spec with this project's attention, norm and experts ({self.expert_product})"

    def lines(self) -> list[str]:
        """For people: one fact and its consequence a line."""
        return [
            f"device: {self.device_name}, {self.cuda_devices} CUDA device(s); collectives over {self.backend}",
            f"torch {self.torch_version}, megatron-core {self.megatron_core_version}",
            f"TransformerEngine {self.transformer_engine_version or 'absent'}, Apex {self.apex_version or 'absent'}",
            f"layers: {self.describe_layers()}",
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
