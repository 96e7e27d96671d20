from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

from megatron_minpro.tracking.versions import UNKNOWN, append_versions, checkout_commit, installed_versions, machine_facts, read_versions


def test_attempts_are_read_as_they_were_written(tmp_path: Path) -> None:
    assert read_versions(tmp_path) == []
    append_versions(tmp_path, global_step=0, versions={"torch": "1"})
    with (tmp_path / "versions.jsonl").open("a") as file:
        file.write('{"began": "torn')
    append_versions(tmp_path, global_step=7, versions={"torch": "2", "cpu": "x"})
    found = read_versions(tmp_path)
    assert [(attempt.global_step, dict(attempt.versions)) for attempt in found] == [(0, {"torch": "1"}), (7, {"torch": "2", "cpu": "x"})]
    assert all(len(attempt.began) == len("2026-11-30 06:13:00") for attempt in found)


@pytest.mark.parametrize(
    "line", ["{}", '{"began": "x", "global_step": 0, "versions": 3}', '{"began": 1, "global_step": "x", "versions": {}}']
)
def test_a_line_of_another_file_is_named(tmp_path: Path, line: str) -> None:
    append_versions(tmp_path, global_step=0, versions={})
    with (tmp_path / "versions.jsonl").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(ValueError, match=r"versions\.jsonl:2: expected the versions of an attempt"):
        read_versions(tmp_path)


def test_versions_are_those_of_this_environment() -> None:
    found = installed_versions()
    assert found["python"] == platform.python_version()
    assert {name: found[name] for name in ("torch", "megatron-core")} == {name: version(name) for name in ("torch", "megatron-core")}
    assert machine_facts()["cpu"] and platform.machine() in machine_facts()["platform"]


def git(folder: Path, *arguments: str) -> str:
    settings = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    return subprocess.run(["git", "-C", str(folder), *settings, *arguments], check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_is_that_of_the_checkout_and_says_what_is_changed(tmp_path: Path) -> None:
    assert checkout_commit(tmp_path) is None
    git(tmp_path, "init", "-q")
    assert checkout_commit(tmp_path) == UNKNOWN, "nothing is committed"
    (tmp_path / "a.py").write_text("1\n")
    git(tmp_path, "add", "a.py")
    git(tmp_path, "commit", "-q", "-m", "a")
    git(tmp_path, "tag", "-a", "v1", "-m", "v1")
    commit = git(tmp_path, "rev-parse", "HEAD")[:12]
    assert checkout_commit(tmp_path) == commit
    (tmp_path / "a.py").write_text("2\n")
    assert checkout_commit(tmp_path) == f"{commit}-dirty"
    (tmp_path / "inside").mkdir()
    assert checkout_commit(tmp_path / "inside") is None, "a package installed somewhere below another project's checkout"


def test_asking_for_the_commit_writes_nothing_into_the_checkout(tmp_path: Path) -> None:
    """A lock that stays behind would stop whoever works in the checkout."""
    git(tmp_path, "init", "-q")
    (tmp_path / "a.py").write_text("1\n")
    git(tmp_path, "add", "a.py")
    git(tmp_path, "commit", "-q", "-m", "a")
    os.utime(tmp_path / "a.py", (1_000_000_000, 1_000_000_000))  # git would note the new time
    index = tmp_path / ".git/index"
    before = index.read_bytes(), index.stat().st_ino
    commit = checkout_commit(tmp_path)
    assert commit == git(tmp_path, "rev-parse", "HEAD")[:12], "a new time is no change"
    assert (index.read_bytes(), index.stat().st_ino) == before
