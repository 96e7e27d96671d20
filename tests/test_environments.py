"""What the environments of trainer and servers are made of: on GPUs both need one torch, one NCCL and one CUDA."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT / "rollout" / "requirements_gpu.txt"
SGLANG = re.search(r"^SGLANG := (sglang==\S+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
# nvcc, its parts, the headers and libraries of the runtime, and what the two processes talk with.
EQUAL = (
    "torch", "triton", "cuda-toolkit", "nvidia-nccl-cu13", "nvidia-cudnn-cu13", "nvidia-cublas", "nvidia-cuda-runtime",
    "nvidia-cuda-nvrtc", "nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-cuda-cccl", "nvidia-nvvm",
)  # fmt: skip


def pins(text: str) -> dict[str, str]:
    """name -> version of the lines name==version."""
    return dict(re.findall(r"^([\w.-]+)(?:\[[\w,]+\])?==([^\s;]+)", text, re.MULTILINE))


def settings_of_pip() -> dict[str, str]:
    """uv's variables for the package index and the certificate that pip is told to use: uv does not read pip's settings."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True).stdout
    settings = dict(re.findall(r"^[\w:]+\.([\w-]+)='(.*)'$", listed, re.MULTILINE))  # the environment's come last
    named = {"UV_DEFAULT_INDEX": settings.get("index-url"), "SSL_CERT_FILE": settings.get("cert")}
    return {name: value for name, value in named.items() if value}


def resolve(python: str, *arguments: str) -> dict[str, str]:
    """What an installation on Linux would take, from the package index; nothing is installed."""
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or "uv"
    command = [uv, "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--python-version", python, "--python-platform"]
    command += ["x86_64-manylinux_2_34", str(SHARED), *arguments]
    environment = {**os.environ, **settings_of_pip()}
    done = subprocess.run(command, input=SGLANG[1] if SGLANG else "", env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return pins(done.stdout)


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_both_roles_get_one_torch_nccl_and_cuda_on_gpus(python: str) -> None:
    with ThreadPoolExecutor() as threads:
        of_trainer = threads.submit(resolve, python, "--extra", "dev", "--extra", "transformer-engine", str(ROOT / "pyproject.toml"))
        of_servers = threads.submit(resolve, python, "-")
    trainer, servers = of_trainer.result(), of_servers.result()
    assert {name: trainer[name] for name in EQUAL} == {name: servers[name] for name in EQUAL}
    assert (
        pins(SHARED.read_text(encoding="utf-8")).items() <= {**servers, "cuda-toolkit": servers["cuda-toolkit"].removesuffix(".0")}.items()
    )
    runtime, nvcc = (servers[name].split(".")[:2] for name in ("nvidia-cuda-runtime", "nvidia-cuda-nvcc"))
    assert runtime == nvcc, "the compiler refuses the headers of another CUDA"
    assert trainer["transformers"] == servers["transformers"]


def test_trainer_and_servers_share_versions_on_cpus() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    trainer = pins("\n".join([*project["dependencies"], *project["optional-dependencies"]["cpu"]]))
    servers = pins((ROOT / "rollout" / "requirements_cpu.txt").read_text(encoding="utf-8"))
    shared = ("torch", "transformers", "psutil", "pydantic", "datasets", "xxhash", "msgspec")
    assert {name: trainer[name] for name in shared} == {name: servers[name] for name in shared}
