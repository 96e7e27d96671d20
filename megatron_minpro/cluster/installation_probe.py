"""A program: what the Python that runs it has installed, as JSON in the last line. `installation.py` starts it for a role.

It needs the standard library alone. Everything it reports was imported, loaded or run, not looked up in metadata.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# In these file systems a folder is (or may be) that of other nodes too.
SHARED_FILE_SYSTEMS = (
    "nfs",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "cifs",
    "smb",
    "9p",
    "afs",
    "glusterfs",
    "panfs",
    "pvfs",
    "wekafs",
    "fuse",
)


def imported(module: str, distribution: str) -> dict[str, str | None]:
    """Import a module: which version, and why the import failed. Both None when its package is not there at all."""
    spec = importlib.util.find_spec(module.partition(".")[0])
    if spec is None or spec.origin is None:  # no origin: folders without a module, which pip leaves when it removes a package
        return {"version": None, "error": None}
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:  # seen of a TransformerEngine of which half is installed
        version = "of unknown version"
    try:
        found = importlib.import_module(module)
    except Exception as error:  # seen: ImportError, OSError (a library, the driver), RuntimeError, FileNotFoundError
        return {"version": version, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    return {"version": str(getattr(found, "__version__", version)), "error": None}


def loaded_nccl() -> str | None:
    """The version of the NCCL in this process, which need not be the one that torch was compiled with. None when there is none."""
    try:
        library = ctypes.CDLL("libnccl.so.2", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:
        return None
    code = ctypes.c_int()
    if library.ncclGetVersion(ctypes.byref(code)):
        return None
    return f"{code.value // 10000}.{code.value // 100 % 100}.{code.value % 100}"


def driver_cuda() -> str | None:
    """The newest CUDA that the driver library serves; None without a driver. Does not touch a device."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    code = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(code)):
        return None
    return f"{code.value // 1000}.{code.value % 1000 // 10}"


def kernel_driver(path: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """The version of NVIDIA's kernel module."""
    found = re.search(r"\s(\d{3,}(?:\.\d+)+)\s", path.read_text(encoding="utf-8")) if path.exists() else None
    return found[1] if found else None


def glibc() -> str | None:
    """None on a machine whose C library is another."""
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").removeprefix("glibc ") or None
    except (ValueError, OSError):
        return None


def cuda_home() -> Path:
    """Where SGLang, torch and tvm-ffi look for the toolkit."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc")
    return Path(named) if named else Path(nvcc).parents[1] if nvcc else Path("/usr/local/cuda")


def nvcc_version(home: Path) -> str | None:
    """What nvcc says of itself, as in 13.0.88. None when it does not run."""
    try:
        said = subprocess.run([str(home / "bin" / "nvcc"), "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"\bV(\d+\.\d+\.\d+)", said)
    return found[1] if found else None


def header_version(home: Path) -> str | None:
    """The version of the CUDA headers beside nvcc, as in 13.0."""
    header = home / "include" / "cuda_runtime_api.h"
    found = (
        re.search(r"#define\s+CUDART_VERSION\s+(\d+)", header.read_text(encoding="utf-8", errors="replace")) if header.exists() else None
    )
    return f"{int(found[1]) // 1000}.{int(found[1]) % 1000 // 10}" if found else None


def file_system(folder: Path, mounts: Path = Path("/proc/self/mounts")) -> str:
    """The type of the file system that a folder lies on."""
    longest, kind = -1, "unknown"
    for line in mounts.read_text(encoding="utf-8").splitlines():
        _, place, found, *_ = line.split(" ")
        place = place.encode().decode("unicode_escape")
        if folder.is_relative_to(place) and len(place) >= longest:  # a later mount covers an earlier one
            longest, kind = len(place), found
    return kind


def cache_folder(variable: str, default: str) -> dict[str, Any]:
    """The folder that a variable names: where it lies, and why it cannot be used, if so."""
    folder = Path(os.environ.get(variable) or default).expanduser().absolute()
    found: dict[str, Any] = {"variable": variable, "path": str(folder), "file_system": "unknown", "shared": False, "error": None}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".minpro_{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        return {**found, "error": f"cannot be written: {error.strerror}"}
    found["file_system"] = file_system(folder.resolve())
    found["shared"] = found["file_system"].startswith(SHARED_FILE_SYSTEMS)
    if os.statvfs(folder).f_flag & os.ST_NOEXEC:
        found["error"] = "nothing may be executed there (noexec)"
    return found


def installed(distribution: str) -> dict[str, str | None]:
    """As `imported`, from metadata alone."""
    try:
        return {"version": importlib.metadata.version(distribution), "error": None}
    except importlib.metadata.PackageNotFoundError:
        return {"version": None, "error": None}


def describe(engine: str, distribution: str, caches: Sequence[str]) -> dict[str, Any]:
    """
    Args:
        engine: the module that the role computes with; "": it is looked up and not imported.
        distribution: what it is installed as.
        caches: variables that name cache folders, each with its default: NAME=FOLDER.
    """
    torch = imported("torch", "torch")
    cuda = sys.modules["torch"].version.cuda if torch["error"] is None and torch["version"] else None
    if engine == "sglang" and cuda is None:
        # SGLang does not import beside a CPU build of torch as it is; rollout's servers there use this entry.
        os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
        importlib.import_module("rollout.sglang.cpu").install()
    found = imported(engine, distribution) if engine else installed(distribution)
    if engine == "sglang" and cuda is not None and found["error"] is None and driver_cuda() is not None:
        found["error"] = imported("sgl_kernel", "sglang-kernel")["error"]  # its libraries need the driver's
    home = cuda_home()
    return {
        "executable": sys.executable,
        "environment": sys.prefix,
        "python": platform.python_version(),
        "glibc": glibc(),
        "driver": kernel_driver(),
        "driver_cuda": driver_cuda(),
        "torch": torch,
        "cuda": cuda,
        "nccl": loaded_nccl(),
        "engine": found,
        "cuda_home": str(home) if home.is_dir() else None,
        "nvcc": nvcc_version(home),
        "cuda_headers": header_version(home),
        "compiler": shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++"),
        "ninja": shutil.which("ninja"),
        "caches": [cache_folder(variable, default) for variable, _, default in (each.partition("=") for each in caches)],
    }


if __name__ == "__main__":
    print("\n" + json.dumps(describe(sys.argv[1], sys.argv[2], sys.argv[3:])), flush=True)
    os._exit(0)  # libraries that were imported for nothing have no say in the exit code
