"""What one role's environment really loads, and whether trainer and servers can work together.

Each role has a Python of its own. `examine` runs a program in it (installation_probe.py), in the environment variables that the role's
processes get. Only that tells which NCCL is loaded and whether TransformerEngine or SGLang import.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_minpro.working_folder import child_environment
from rollout.sglang.environment import default_server_python, link_packages, server_environment

Role = Literal["trainer", "servers"]

_PROBE = Path(__file__).with_name("installation_probe.py")
_TIMEOUT_S = 600.0  # a first import from a busy shared file system takes minutes
_TRAINER: tuple[str, ...] = ("transformer_engine.pytorch", "transformer-engine", "TRITON_CACHE_DIR=~/.triton/cache")
_SERVERS: tuple[str, ...] = ("sglang", "sglang", "SGLANG_CACHE_DIR=~/.cache/sglang", "SGLANG_JIT_CACHE_DIR=~/.cache/sglang/jit")
# sglang-kernel's wheels are built for it.
_SERVERS_GLIBC = (2, 34)


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """version: None when it is not installed. error: why it does not import; None when it does."""

    version: str | None
    error: str | None

    @property
    def usable(self) -> bool:
        return self.version is not None and self.error is None

    def __str__(self) -> str:
        return "absent" if self.version is None else self.version if self.error is None else f"{self.version}: {self.error}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheFolder:
    """Where compiled kernels are kept. shared: on a file system that other nodes may see. error: why it cannot be used."""

    variable: str
    path: str
    file_system: str
    shared: bool
    error: str | None

    def __str__(self) -> str:
        return f"{self.path} ({self.error or self.file_system})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Installation:
    """One role's environment on one machine. None: not there, or does not say.

    executable, environment: its Python, the folder that it stands in. driver: version of the kernel module. driver_cuda: the newest CUDA
    that the driver serves. cuda: what torch was built for. nccl: what is loaded after `import torch`. engine: TransformerEngine, or SGLang.
    nvcc, cuda_headers: in cuda_home.
    """

    role: Role
    executable: str
    environment: str
    python: str
    glibc: str | None
    driver: str | None
    driver_cuda: str | None
    torch: Package
    cuda: str | None
    nccl: str | None
    engine: Package
    cuda_home: str | None
    nvcc: str | None
    cuda_headers: str | None
    compiler: str | None
    ninja: str | None
    caches: tuple[CacheFolder, ...]

    @property
    def on_gpu_machine(self) -> bool:
        """Whether there is a driver: then what is wrong here stops a run."""
        return self.driver is not None or self.driver_cuda is not None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Installation:
        packages = {name: Package(**values[name]) for name in ("torch", "engine")}
        return cls(**{**values, **packages, "caches": tuple(CacheFolder(**each) for each in values["caches"])})


def probe_command(role: Role, *, import_engine: bool) -> list[str]:
    """The program that describes the environment of the Python that runs it, and its arguments.

    Args:
        role: whose environment it is.
        import_engine: see whether SGLang or TransformerEngine imports, which takes seconds to a minute. Else it is only looked up.
    """
    engine, *others = _TRAINER if role == "trainer" else _SERVERS
    return [str(_PROBE), engine if import_engine else "", *others]


def examine(role: Role, *, timeout_s: float = _TIMEOUT_S) -> Installation:
    """Start the role's Python and let it describe itself. Takes seconds: it imports torch, and SGLang or TransformerEngine.

    Raises:
        ValueError: there is no such Python, or it ended without an answer; one line.
    """
    python = Path(sys.executable) if role == "trainer" else default_server_python()
    with tempfile.TemporaryDirectory(prefix="minpro_installation_") as folder:
        if role == "trainer":
            environment = child_environment()
        else:
            packages = link_packages(Path(folder))
            environment = server_environment(python, device="cuda", num_threads=1, packages=packages)
        try:
            done = subprocess.run(
                [str(python), *probe_command(role, import_engine=True)],
                env=environment,
                capture_output=True,
                text=True,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise ValueError(f"{role}: {python} did not describe itself within {timeout_s:.0f} s") from None
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"{role}: {python} cannot describe itself (exit code {done.returncode}): {reason}")
    return Installation.from_json({"role": role, **json.loads(done.stdout.splitlines()[-1])})


def examine_all() -> tuple[list[Installation], dict[Role, str]]:
    """Both roles at the same time: those that could be described, and why the others could not."""
    roles: tuple[Role, ...] = ("trainer", "servers")
    found: list[Installation] = []
    unknown: dict[Role, str] = {}
    with ThreadPoolExecutor(len(roles)) as threads:
        for role, future in [(role, threads.submit(examine, role)) for role in roles]:
            try:
                found.append(future.result())
            except ValueError as error:
                unknown[role] = str(error)
    return found, unknown


def differences(trainer: Installation, servers: Installation) -> list[str]:
    """Why weights cannot be broadcast from one to the other over NCCL; one line each, naming both."""
    pairs = (
        ("torch", trainer.torch.version, servers.torch.version),
        ("CUDA", trainer.cuda, servers.cuda),
        ("NCCL", trainer.nccl, servers.nccl),
    )
    return [
        f"{what}: the trainer has {ours or 'none'} ({trainer.environment}), the servers have {theirs or 'none'} ({servers.environment}); "
        "expected the same (make setup-gpu)"
        for what, ours, theirs in pairs
        if ours != theirs
    ]


def broken(found: Installation) -> list[str]:
    """What stops the role on any machine; one line each."""
    needed = {"torch": found.torch, **({"sglang": found.engine} if found.role == "servers" else {})}
    return [f"{name} {package} in {found.environment}, expected one that imports" for name, package in needed.items() if not package.usable]


def faults(found: Installation) -> list[str]:
    """What stops the role where there are GPUs; one line each."""
    lines = []
    if found.torch.usable and found.cuda is None:
        lines.append(f"torch {found.torch} is built without CUDA (make setup-gpu)")
    if found.cuda is not None and found.driver_cuda is not None and _numbers(found.driver_cuda)[0] < _numbers(found.cuda)[0]:
        lines.append(f"driver {found.driver or 'of unknown version'} serves CUDA {found.driver_cuda}, torch needs {found.cuda}: update it")
    lines += [f"{each.variable}: {each.path} {each.error}" for each in found.caches if each.error is not None]
    return lines + (_compile_faults(found) if found.role == "servers" else [])


def _compile_faults(found: Installation) -> list[str]:
    """What SGLang needs beside torch: it compiles kernels at start."""
    lines = []
    if found.glibc is not None and _numbers(found.glibc) < _SERVERS_GLIBC:
        lines.append(f"glibc {found.glibc}, SGLang's kernels need 2.34 or later: use a container (slurm/README.md)")
    if found.nvcc is None:
        lines.append(f"nvcc: none in {found.cuda_home or 'CUDA_HOME'} (make setup-gpu)")
    elif found.cuda_headers is None:
        lines.append(f"nvcc {found.nvcc}: no CUDA headers beside it in {found.cuda_home}, expected CUDA_HOME to name a whole toolkit")
    elif _numbers(found.nvcc)[:2] != _numbers(found.cuda_headers)[:2]:
        lines.append(f"nvcc {found.nvcc} over CUDA headers {found.cuda_headers} in {found.cuda_home}, expected the same (make setup-gpu)")
    tools = {"C++ compiler": found.compiler, "ninja": found.ninja}
    return lines + [f"{name}: none on PATH, SGLang compiles with it" for name, path in tools.items() if path is None]


def notes(found: Installation) -> list[str]:
    """What costs time, and stops nothing."""
    return [
        f"{each.variable}: {each.path} lies on {each.file_system}, which nodes may share; a local folder starts faster"
        for each in found.caches
        if each.shared and each.error is None
    ]


def rows(installations: Sequence[Installation]) -> list[tuple[str, ...]]:
    """Side by side, for people: a fact, and what each of them says."""
    facts = (
        ("environment", "environment"),
        ("python", "python"),
        ("torch", "torch"),
        ("CUDA of torch", "cuda"),
        ("NCCL loaded", "nccl"),
        ("engine", "engine"),
        ("glibc", "glibc"),
        ("driver", "driver"),
        ("CUDA of the driver", "driver_cuda"),
        ("CUDA_HOME", "cuda_home"),
        ("nvcc", "nvcc"),
        ("CUDA headers", "cuda_headers"),
        ("C++ compiler", "compiler"),
        ("ninja", "ninja"),
    )
    table = [(label, *(str(getattr(each, name) or "none") for each in installations)) for label, name in facts]
    return [*table, ("caches", *("\n".join(map(str, each.caches)) for each in installations))]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(each) for each in version.split("."))
