"""The wheel, built from the sdist and installed elsewhere, brings everything that the commands read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rollout.sglang.environment import default_server_python

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("megatron_minpro", "parallel", "rollout", "checkpoints_convert")


def run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the wheel is installed in. Its dependencies are this interpreter's; the network is not asked."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(ROOT), cwd=folder)
    [wheel] = (folder / "dist").glob("*.whl")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile")
    run(*pip, "--target", str(folder / "installed"), str(wheel), cwd=folder)
    return folder / "installed"


def minpro(installed: Path, cwd: Path, *arguments: str) -> str:
    return run(
        str(installed / "bin" / "minpro"),
        *arguments,
        cwd=cwd,
        PYTHONPATH=str(installed),
        MINPRO_SERVER_PYTHON=str(default_server_python()),
    )


def test_the_wheel_holds_every_module_and_every_shipped_configuration(installed: Path) -> None:
    listed = run("git", "ls-files", *PACKAGES, cwd=ROOT).split()
    assert "rollout/requirements_cpu.txt" in listed and "parallel/planner/published_rows.yaml" in listed
    listed += [f"parallel/{name}" for name in run("git", "ls-files", "configs", cwd=ROOT).split()]
    assert [name for name in listed if (ROOT / name.removeprefix("parallel/")).exists() and not (installed / name).is_file()] == []


def test_a_shipped_configuration_is_planned_by_name(installed: Path, tmp_path: Path) -> None:
    plan = json.loads(minpro(installed, tmp_path, "plan", "qwen3_30b_a3b", "--hardware", "h200", "--json"))
    assert plan["hardware"] == "h200"


def test_doctor_finds_a_shipped_run_and_the_named_server_environment(installed: Path, tmp_path: Path) -> None:
    answer = json.loads(minpro(installed, tmp_path, "doctor", "tiny_moe_cpu", "--json"))
    details = {finding["subject"]: finding["detail"] for finding in answer["findings"]}
    assert str(default_server_python().parent.parent) in details["sglang"]
    assert details["run"] == "tiny_moe_cpu: its files are here"


def test_convert_describes_itself(installed: Path, tmp_path: Path) -> None:
    assert "hf-to-megatron" in minpro(installed, tmp_path, "convert", "--help")
