"""Compiles the C++ device guard on first use and loads it before torch, whose registry of hooks is read once."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".cpp")
# The rehearsal stands on torch's internals (fake tensors, hooks of devices, fake process groups). Seen to work with:
SEEN_TORCH = ("2.13.0",)


def check_torch(version: str) -> None:
    """Raises ValueError for a torch whose internals the rehearsal was not seen to work with."""
    if version.partition("+")[0] not in SEEN_TORCH:
        raise ValueError(
            f"torch {version}: the rehearsal needs internals of torch that were seen in {', '.join(SEEN_TORCH)} only; "
            f"install one of these versions in the environment that rehearses"
        )


def load() -> None:
    """Load the device guard into this process.

    Raises:
        ValueError: torch is of an unknown version, or has CUDA, or g++ is missing or does not compile the guard.
        RuntimeError: torch was imported earlier.
    """
    if "torch" in sys.modules:
        raise RuntimeError("torch was imported before the device guard; run python -m parallel.rehearsal in a new process")
    version = importlib.metadata.version("torch")
    check_torch(version)
    ctypes.CDLL(str(build(version)), mode=ctypes.RTLD_GLOBAL)


def build(version: str) -> Path:
    """The compiled guard in the user's cache, made on first use for each torch version and source text.

    Raises:
        ValueError: names g++ where it is missing, or its first error.
    """
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    torch_folder = Path(spec.origin).parent
    if (torch_folder / "lib" / "libtorch_cuda.so").exists():
        raise ValueError(f"torch {version} is built for CUDA and has a device guard of its own; the rehearsal needs torch's CPU build")
    text = SOURCE.read_bytes()
    key = hashlib.sha256(text + str(torch_folder).encode()).hexdigest()[:12]
    library = _cache_folder() / f"device_guard-torch-{version}-{key}.so"
    if library.is_file():
        return library
    compiler = shutil.which("g++")
    if compiler is None:
        raise ValueError("g++ is not on PATH: the rehearsal compiles a small C++ file once per torch version; install g++ (C++20)")
    library.parent.mkdir(parents=True, exist_ok=True)
    unfinished = library.with_suffix(f".{os.getpid()}")
    include = torch_folder / "include"
    command = [compiler, "-O1", "-std=c++20", "-shared", "-fPIC", f"-I{include}", f"-I{include / 'torch/csrc/api/include'}"]
    command += [str(SOURCE), "-o", str(unfinished), f"-L{torch_folder / 'lib'}", f"-Wl,-rpath,{torch_folder / 'lib'}"]
    done = subprocess.run([*command, "-lc10", "-ltorch_cpu"], capture_output=True, text=True)
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
        raise ValueError(f"{compiler} does not compile {SOURCE.name} against torch {version}: {first.strip()}")
    unfinished.replace(library)
    return library


def _cache_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "megatron_minpro"
