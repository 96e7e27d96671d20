"""What a role's Python really loads, seen through real processes; and what follows from two of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_minpro.cluster import installation_probe
from megatron_minpro.cluster.facts import judge
from megatron_minpro.cluster.installation import CacheFolder, Installation, Package, broken, differences, examine, faults, notes, rows

GPU = Installation(
    role="servers",
    executable="/s/bin/python",
    environment="/s",
    python="3.11.7",
    glibc="2.36",
    driver="580.65.06",
    driver_cuda="13.0",
    torch=Package(version="2.14.1+cu130", error=None),
    cuda="13.0",
    nccl="2.30.7",
    engine=Package(version="0.5.23", error=None),
    cuda_home="/s/cuda",
    nvcc="13.0.88",
    cuda_headers="13.0",
    compiler="/usr/bin/c++",
    ninja="/s/bin/ninja",
    caches=(CacheFolder(variable="SGLANG_CACHE_DIR", path="/tmp/c", file_system="ext4", shared=False, error=None),),
)
TRAINER = replace(GPU, role="trainer", environment="/t", engine=Package(version=None, error=None), nvcc=None, ninja=None)
NO_GPU = {"driver": None, "driver_cuda": None}


def library(folder: Path, name: str, code: str) -> None:
    """A shared library of that file name, made of C code."""
    (folder / "code.c").write_text(code)
    subprocess.run(["cc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(folder / name), str(folder / "code.c")], check=True)


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A torch that was compiled with NCCL 2.29.7 and loads 2.30.7, a TransformerEngine without its library, a driver for CUDA 12.4."""
    library(tmp_path, "libnccl.so.2", "int ncclGetVersion(int *version) { *version = 23007; return 0; }")
    library(tmp_path, "libcuda.so.1", "int cuDriverGetVersion(int *version) { *version = 12040; return 0; }")
    texts = {
        "torch": f"import ctypes; ctypes.CDLL('{tmp_path}/libnccl.so.2')\nfrom . import version\n__version__ = '2.14.1+cu130'\n",
        "transformer_engine": "",
        "broken": "import ctypes; ctypes.CDLL('libof_a_gpu.so.1')",
    }
    for name, text in texts.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text)
    (tmp_path / "torch" / "version.py").write_text("cuda = '13.0'\nnccl = (2, 29, 7)\n")
    (tmp_path / "transformer_engine" / "pytorch.py").write_text("import broken")
    return tmp_path


def probe(folder: Path, *arguments: str, **environment: str) -> Installation:
    """What the program says in this Python, with the packages and libraries of a folder."""
    variables = {**os.environ, "PYTHONPATH": str(folder), "LD_LIBRARY_PATH": str(folder), "PYTHONSAFEPATH": "1", **environment}
    command = [sys.executable, installation_probe.__file__, "transformer_engine.pytorch", "transformer-engine", *arguments]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    return Installation.from_json({"role": "trainer", **json.loads(done.stdout.splitlines()[-1])})


def test_what_is_loaded_is_reported_not_what_is_declared(packages: Path) -> None:
    found = probe(packages)
    assert (found.torch.version, found.cuda, found.nccl, found.driver_cuda) == ("2.14.1+cu130", "13.0", "2.30.7", "12.4")
    assert found.engine.version == "of unknown version" and found.engine.error is not None
    assert found.engine.error.startswith("OSError: libof_a_gpu.so.1: cannot open shared object file")
    assert found.executable == sys.executable and found.environment == sys.prefix


def test_folders_that_pip_leaves_are_no_package(packages: Path) -> None:
    for name in ("__init__.py", "pytorch.py"):
        (packages / "transformer_engine" / name).unlink()
    assert probe(packages).engine == Package(version=None, error=None)


def test_a_toolkit_is_what_cuda_home_holds(packages: Path, tmp_path: Path) -> None:
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    (home / "include").mkdir()
    (home / "bin" / "nvcc").write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.5, V13.5.37'\n")
    (home / "bin" / "nvcc").chmod(0o755)
    (home / "include" / "cuda_runtime_api.h").write_text("/* */\n#define CUDART_VERSION  13000\n")
    found = probe(packages, CUDA_HOME=str(home))
    assert (found.cuda_home, found.nvcc, found.cuda_headers) == (str(home), "13.5.37", "13.0")


def test_caches_are_tried(packages: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = probe(packages, "GOOD=/nowhere", f"BAD={tmp_path}/file/cache", GOOD=str(tmp_path / "new"))
    good, bad = found.caches
    assert (good.path, good.error, good.shared) == (str(tmp_path / "new"), None, False)
    assert good.file_system == subprocess.run(["df", "--output=fstype", tmp_path], capture_output=True, text=True).stdout.split()[1]
    assert bad.error == "cannot be written: Not a directory"


def test_a_folder_on_a_shared_file_system_is_known(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "/dev/vda / ext4 rw 0 0\nserver:/home /home nfs4 rw 0 0\ntmpfs /home/local tmpfs rw 0 0\n/dev/b /with\\040space xfs rw 0 0\n"
    )
    kinds = [
        installation_probe.file_system(Path(each), mounts)
        for each in ("/tmp", "/home/me/.cache", "/home/local/x", "/with space/x", "/homes")
    ]
    assert kinds == ["ext4", "nfs4", "tmpfs", "xfs", "ext4"]


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\nGCC version: 12.2.0\n", "535.183.01"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (root@host)\n", "580.65.06"),
    ],
)
def test_the_driver_is_read_from_the_kernel(tmp_path: Path, text: str, version: str) -> None:
    (tmp_path / "version").write_text(text)
    assert installation_probe.kernel_driver(tmp_path / "version") == version
    assert installation_probe.kernel_driver(tmp_path / "absent") is None


def test_this_trainer_describes_itself() -> None:
    import torch

    found = examine("trainer")
    assert (found.torch.version, found.cuda, found.executable) == (torch.__version__, torch.version.cuda, sys.executable)
    assert found.glibc is not None and tuple(map(int, found.glibc.split("."))) >= (2, 28)
    assert Installation.from_json(json.loads(json.dumps(found.as_json()))) == found


def test_a_python_that_cannot_answer_is_named_with_its_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'libpython is missing' >&2\nexit 127\n")
    python.chmod(0o755)
    monkeypatch.setenv("MINPRO_SERVER_PYTHON", str(python))
    with pytest.raises(ValueError, match=rf"^servers: {python} cannot describe itself \(exit code 127\): libpython is missing$"):
        examine("servers")


def test_equal_environments_have_no_differences() -> None:
    assert (differences(TRAINER, GPU), broken(GPU), faults(GPU), notes(GPU), faults(TRAINER)) == ([], [], [], [], [])
    assert {finding.verdict for finding in judge([TRAINER, GPU], {})} == {"ok"}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"nccl": "2.29.7"}, "NCCL: the trainer has 2.29.7 (/t), the servers have 2.30.7 (/s); expected the same (make setup-gpu)"),
        ({"cuda": "12.9"}, "CUDA: the trainer has 12.9 (/t), the servers have 13.0 (/s); expected the same (make setup-gpu)"),
        (
            {"torch": Package(version="2.13.0+cu130", error=None)},
            "torch: the trainer has 2.13.0+cu130 (/t), the servers have 2.14.1+cu130 (/s); expected the same (make setup-gpu)",
        ),
    ],
)
def test_what_differs_names_both_and_stops_gpus_alone(change: dict[str, object], line: str) -> None:
    trainer = replace(TRAINER, **change)  # type: ignore[arg-type]
    assert differences(trainer, GPU) == [line]
    assert ("weight sync", "missing", line) in [(each.subject, each.verdict, each.detail) for each in judge([trainer, GPU], {})]
    on_cpu = judge([replace(trainer, **NO_GPU), replace(GPU, **NO_GPU)], {})
    assert "missing" not in {each.verdict for each in on_cpu} and line in [each.detail for each in on_cpu]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"torch": Package(version="2.14.1", error=None), "cuda": None}, "torch 2.14.1 is built without CUDA (make setup-gpu)"),
        ({"driver": "550.54", "driver_cuda": "12.4"}, "driver 550.54 serves CUDA 12.4, torch needs 13.0: update it"),
        ({"glibc": "2.28"}, "glibc 2.28, SGLang's kernels need 2.34 or later: use a container (slurm/README.md)"),
        ({"nvcc": None}, "nvcc: none in /s/cuda (make setup-gpu)"),
        ({"cuda_headers": None}, "nvcc 13.0.88: no CUDA headers beside it in /s/cuda, expected CUDA_HOME to name a whole toolkit"),
        ({"nvcc": "13.5.37"}, "nvcc 13.5.37 over CUDA headers 13.0 in /s/cuda, expected the same (make setup-gpu)"),
        ({"ninja": None}, "ninja: none on PATH, SGLang compiles with it"),
        ({"compiler": None}, "C++ compiler: none on PATH, SGLang compiles with it"),
        (
            {"caches": (CacheFolder(variable="C", path="/c", file_system="xfs", shared=False, error="cannot be written: Read-only"),)},
            "C: /c cannot be written: Read-only",
        ),
    ],
)
def test_what_gpus_need_is_one_line_and_stops_a_run_there(change: dict[str, object], line: str) -> None:
    found = replace(GPU, **change)  # type: ignore[arg-type]
    assert faults(found) == [line]
    assert ("servers", "missing", line) in [(each.subject, each.verdict, each.detail) for each in judge([TRAINER, found], {})]


def test_servers_without_sglang_are_missing_on_any_machine() -> None:
    servers = replace(GPU, **NO_GPU, cuda=None, engine=Package(version="0.5.23", error="ImportError: no libnuma"))  # type: ignore[arg-type]
    [finding] = [each for each in judge([replace(TRAINER, **NO_GPU, cuda=None), servers], {}) if each.verdict == "missing"]  # type: ignore[arg-type]
    assert finding.detail == "sglang 0.5.23: ImportError: no libnuma in /s, expected one that imports"


def test_a_shared_cache_is_slow_and_stops_nothing() -> None:
    found = replace(GPU, caches=(CacheFolder(variable="C", path="/home/c", file_system="nfs4", shared=True, error=None),))
    assert faults(found) == []
    assert notes(found) == ["C: /home/c lies on nfs4, which nodes may share; a local folder starts faster"]


def test_both_roles_stand_side_by_side() -> None:
    table = {row[0]: row[1:] for row in rows([replace(TRAINER, nccl=None), GPU])}
    assert table["NCCL loaded"] == ("none", "2.30.7")
    assert table["engine"] == ("absent", "0.5.23")
    assert table["caches"][1] == "/tmp/c (ext4)"
