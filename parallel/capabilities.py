"""What this machine offers. This file alone decides what differs between CPU and GPU.

Seen so far: gloo, the local layer spec and torch's own optimizer. Never run: TransformerEngine's layer spec.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass, replace
from typing import Literal

import torch

from parallel.engine_import import EngineImport, import_engine

Layers = Literal["auto", "local", "transformer_engine"]
AttentionProduct = Literal["varlen", "grid"]

_FLASH_ATTENTION = (8, 0)  # compute capability that torch's flash attention needs


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
    """Facts and one setting, then the choices that follow from them."""

    cuda_devices: int
    device_name: str
    torch_version: str
    megatron_core_version: str
    transformer_engine: EngineImport
    apex_version: str | None
    compute_capability: tuple[int, int] | None = None  # of the first CUDA device
    layers: Layers = "auto"  # actor.layers

    def choose_layers(self, layers: Layers) -> Capabilities:
        """The same machine with the user's choice of layers.

        Args:
            layers: "auto" takes TransformerEngine's where it imports and CUDA is there, else Megatron-Core's local ones.

        Raises:
            ValueError: this machine has no TransformerEngine and the choice demands it.
        """
        if layers == "transformer_engine" and not self._has_engine:
            here = self.transformer_engine.describe() if self.cuda_devices else "this machine has no CUDA device"
            raise ValueError(f"actor.layers: 'transformer_engine', but {here}; expected auto or local here")
        return replace(self, layers=layers)

    @property
    def _has_engine(self) -> bool:
        return self.cuda_devices > 0 and self.transformer_engine_version is not None

    @property
    def transformer_engine_version(self) -> str | None:
        """None where it does not import."""
        return self.transformer_engine.usable_version

    @property
    def device_type(self) -> Literal["cuda", "cpu"]:
        return "cuda" if self.cuda_devices else "cpu"

    @property
    def backend(self) -> Literal["nccl", "gloo"]:
        return "nccl" if self.cuda_devices else "gloo"

    @property
    def layer_spec(self) -> Literal["transformer_engine", "local"]:
        """TransformerEngine's, or Megatron-Core's local one with this project's plug-ins."""
        return "transformer_engine" if self._has_engine and self.layers != "local" else "local"

    def expert_product(self, dtype: torch.dtype) -> Literal["grouped", "loop"]:
        """How `experts.py` multiplies. On a CPU the loop is the faster one (make bench); the grouped CUDA kernel takes bfloat16 alone."""
        return "grouped" if self.cuda_devices and dtype == torch.bfloat16 else "loop"

    def attention_product(self, dtype: torch.dtype) -> AttentionProduct:
        """How the local layers attend (layers/attention_varlen.py, attention_grid.py). On a CPU grids: fewer calls for short sequences.

        Raises:
            ValueError: flash attention is needed, and this GPU is too old for it.
        """
        if self.compute_capability is None or dtype == torch.float32:  # the kernel takes 16-bit heads only
            return "grid"
        if self.compute_capability < _FLASH_ATTENTION:
            found, name = ".".join(map(str, self.compute_capability)), str(dtype).removeprefix("torch.")
            raise ValueError(
                f"model.dtype: {name} with the local layers needs flash attention (compute capability 8.0 or later); "
                f"{self.device_name} has {found}; expected float32 on this GPU"
            )
        return "varlen"

    def describe_layers(self) -> str:
        """Which layers the model is made of."""
        if self.layer_spec == "transformer_engine":
            return f"TransformerEngine {self.transformer_engine_version}'s layer spec"
        reason = ""
        if self.cuda_devices:
            reason = f"; {'actor.layers = local' if self.layers == 'local' else self.transformer_engine.describe()}"
        return f"the local layer spec with this project's attention, norm and experts{reason}"

    def lines(self) -> list[str]:
        """For people: one fact and its consequence a line."""
        return [
            f"device: {self.device_name}, {self.cuda_devices} CUDA device(s); collectives over {self.backend}",
            f"torch {self.torch_version}, megatron-core {self.megatron_core_version}",
            f"{self.transformer_engine.describe()}, Apex {self.apex_version or 'absent'}",
            f"layers: {self.describe_layers()}",
        ]


def detect() -> Capabilities:
    """Look, without importing Megatron-Core or opening a CUDA context. Imports TransformerEngine where it is installed."""
    cuda_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return Capabilities(
        cuda_devices=cuda_devices,
        device_name=torch.cuda.get_device_name(0) if cuda_devices else "CPU",
        torch_version=torch.__version__,
        megatron_core_version=_version("megatron-core", "megatron") or "absent",
        transformer_engine=import_engine(),
        # NVIDIA's Apex has amp_C kernels; the package of that name on the index has nothing to do with it.
        apex_version=_version("apex", "apex") if importlib.util.find_spec("amp_C") is not None else None,
        compute_capability=torch.cuda.get_device_capability(0) if cuda_devices else None,
    )
