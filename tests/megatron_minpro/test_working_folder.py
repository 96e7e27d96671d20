"""A user's own `parallel.py`, `rollout/` or `configs/` in the working folder breaks nothing; ranks: scaling/test_measure.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_minpro.rewards.grader_pool import GraderPool
from megatron_minpro.working_folder import child_environment, without_working_folder
from rollout.sglang.environment import default_server_python, link_packages, server_environment

ROOT = Path(__file__).resolve().parents[2]


def run(command: list[str], environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_command_imports_our_packages(hostile_folder: Path) -> None:
    minpro = str(Path(sys.executable).with_name("minpro"))
    done = run([minpro, "plan", str(ROOT / "configs" / "tiny_moe_cpu.yaml"), "--hardware", "cpu", "--json"])
    assert done.returncode == 0, done.stderr


def test_a_server_imports_our_package_and_its_own_sglang(hostile_folder: Path, tmp_path: Path) -> None:
    packages = link_packages(tmp_path)
    program = "import importlib.util, rollout.sglang.cpu as cpu; print(cpu.__file__, importlib.util.find_spec('sglang').origin)"
    python = default_server_python()
    environment = server_environment(python, device="cuda", num_threads=1, packages=packages)  # cuda: nothing is patched at import
    done = run([str(python), "-c", program], environment)
    assert done.returncode == 0, done.stderr
    ours, sglang = done.stdout.split()
    assert Path(ours).resolve() == ROOT / "rollout" / "sglang" / "cpu" / "__init__.py"
    assert python.parent.parent in Path(sglang).parents


def test_a_server_sees_no_package_that_lies_beside_ours(tmp_path: Path) -> None:
    packages = link_packages(tmp_path)
    assert [entry.name for entry in packages.iterdir()] == ["rollout"]
    environment = server_environment(default_server_python(), device="cpu", num_threads=1, packages=packages)
    assert (environment["PYTHONPATH"], environment["PYTHONSAFEPATH"]) == (str(packages), "1")


def test_a_grader_imports_the_installed_math_verify(hostile_folder: Path) -> None:
    with GraderPool(workers=1, timeout_s=20.0, memory_mb=4096) as graders:
        [verdict] = graders.compare([("1/2", "0.5")])
    assert verdict.equal is True


def test_only_the_working_folder_leaves_the_search_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert without_working_folder(["", "/usr/lib", ".", str(tmp_path), "below"]) == ["/usr/lib", "below"]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["/somewhere", "", "."]))
    assert child_environment()["PYTHONPATH"] == "/somewhere"


def test_the_folder_of_our_packages_stays_on_the_search_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert without_working_folder(["", "/usr/lib"]) == ["", "/usr/lib"]
