"""CUDA packages that Megatron-Core uses where they are installed, and that do not import on this machine, are hidden from it.

Megatron-Core takes ImportError alone for "not there". Without a driver, or without one of its libraries, such a package raises OSError,
and `import megatron.core` would end with it: no command would run on a login node.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Iterator

# As Megatron-Core imports them. TransformerEngine is looked at in engine_import.py.
OPTIONAL = (
    "amp_C",
    "apex",
    "causal_conv1d",
    "deep_ep",
    "emerging_optimizers",
    "fast_hadamard_transform",
    "fla",
    "flash_attn",
    "flash_attn_3.flash_attn_interface",
    "flash_mla",
    "flashattn_hopper.flash_attn_interface",
    "flashinfer",
    "fused_weight_gradient_mlp_cuda",
    "grouped_gemm",
    "mamba_ssm",
    "nvidia_kitchen",
    "torch_memory_saver",
)


def hide(package: str) -> None:
    """From now on importing the package fails as if it were not installed."""
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        del sys.modules[name]
    sys.modules[package] = None  # type: ignore[assignment]  # Python's way to say that a module is not there


@functools.cache
def hide_unusable() -> tuple[str, ...]:
    """Try each that is installed. One line for each that is hidden."""
    return tuple(_hidden())


def _hidden() -> Iterator[str]:
    for module in OPTIONAL:
        package = module.partition(".")[0]
        if package in sys.modules or importlib.util.find_spec(package) is None:
            continue
        try:
            importlib.import_module(module)
        except ImportError:  # Megatron-Core knows what to do
            continue
        except Exception as error:
            hide(package)
            yield f"{package} is installed but does not import ({type(error).__name__}: {' '.join(str(error).split())}): it is not used"
