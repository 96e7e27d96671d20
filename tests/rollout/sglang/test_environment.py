"""What a server process gets of this process's environment, and where its Python is."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from rollout.sglang.environment import default_server_python, server_environment

PACKAGES = Path("packages")


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A server environment's Python, with `ninja` beside it, and a temporary folder of this test's."""
    for name in ("CUDA_HOME", "CUDA_PATH", "SGLANG_CACHE_DIR", "SGLANG_JIT_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    programs = tmp_path / "environment" / "bin"
    programs.mkdir(parents=True)
    for name, text in (("python", "#!/bin/sh\n"), ("ninja", "#!/bin/sh\necho this one\n")):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    return programs / "python"


def with_toolkit(python: Path) -> Path:
    toolkit = python.parents[1] / "lib/python3.11/site-packages/nvidia/cu13"
    (toolkit / "bin").mkdir(parents=True)
    (toolkit / "bin" / "nvcc").write_text("")
    return toolkit


def variables(python: Path, *, device: str = "cuda") -> dict[str, str]:
    return server_environment(python, device=device, num_threads=1, packages=PACKAGES)


def test_a_launcher_s_variables_are_kept_from_servers(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.setenv(name, "1")
    got = variables(environment, device="cpu")
    assert not {name for name in got if name in ("RANK", "WORLD_SIZE") or name.startswith(("MASTER_", "LOCAL_", "TORCHELASTIC"))}
    assert got["SGLANG_USE_CPU_ENGINE"] == "1" and got["OMP_NUM_THREADS"] == "1"
    assert got["SGLANG_RETURN_ORIGINAL_LOGPROB"] == "0", "log-probs are those at the temperature, whatever this environment says"
    assert "SGLANG_USE_CPU_ENGINE" not in variables(environment)


def test_server_python_is_named_or_lies_beside_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINPRO_SERVER_PYTHON", sys.executable)
    assert default_server_python() == Path(sys.executable)
    monkeypatch.setenv("MINPRO_SERVER_PYTHON", "/nowhere/python")
    with pytest.raises(ValueError, match=r"/nowhere/python \(MINPRO_SERVER_PYTHON\) is not an executable"):
        default_server_python()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_servers_run_the_programs_of_their_own_environment(environment: Path, device: str) -> None:
    done = subprocess.run(["/usr/bin/env", "ninja"], env=variables(environment, device=device), capture_output=True, text=True, check=True)
    assert done.stdout == "this one\n"


def test_a_server_python_without_a_folder_is_looked_up(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{environment.parent}:/usr/bin")
    assert variables(Path("python"))["PATH"].split(":")[0] == str(environment.parent)


def test_servers_compile_with_the_toolkit_of_their_environment(environment: Path) -> None:
    assert "CUDA_HOME" not in variables(environment)
    toolkit = with_toolkit(environment)
    assert variables(environment)["CUDA_HOME"] == str(toolkit)
    assert "CUDA_HOME" not in variables(environment, device="cpu")


@pytest.mark.parametrize("name", ["CUDA_HOME", "CUDA_PATH"])
def test_a_toolkit_that_the_user_names_stays(environment: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with_toolkit(environment)
    monkeypatch.setenv(name, "/opt/cuda")
    got = variables(environment)
    assert {key: got[key] for key in ("CUDA_HOME", "CUDA_PATH") if key in got} == {name: "/opt/cuda"}


def test_both_caches_lie_in_a_folder_of_this_user_s_on_the_node(environment: Path, tmp_path: Path) -> None:
    got = variables(environment)
    own = tmp_path / "tmp" / f"minpro_{os.getuid()}"
    assert (got["SGLANG_CACHE_DIR"], got["SGLANG_JIT_CACHE_DIR"]) == (f"{own}/sglang", f"{own}/sglang/jit")
    assert stat.S_IMODE(own.stat().st_mode) == 0o700


def test_caches_that_the_user_names_stay(environment: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SGLANG_CACHE_DIR", "/warm")
    got = variables(environment)
    assert (got["SGLANG_CACHE_DIR"], got["SGLANG_JIT_CACHE_DIR"]) == ("/warm", "/warm/jit")
    monkeypatch.setenv("SGLANG_JIT_CACHE_DIR", "/other")
    assert variables(environment)["SGLANG_JIT_CACHE_DIR"] == "/other"
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_cache_folder_that_others_may_write_to_is_refused(environment: Path, tmp_path: Path) -> None:
    own = tmp_path / "tmp" / f"minpro_{os.getuid()}"
    own.mkdir()
    own.chmod(0o777)
    with pytest.raises(ValueError, match=rf"^{own}: others may write there, expected .*SGLANG_CACHE_DIR$"):
        variables(environment)
