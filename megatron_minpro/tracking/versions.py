"""RUN_DIR/versions.jsonl: with which versions, on which machine, each attempt of a run computed. One line an attempt."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import megatron_minpro
from megatron_minpro.tracking.json_lines import JsonLines, read_json_lines
from megatron_minpro.tracking.run_files import VERSIONS_FILE

UNKNOWN = "unknown"
_PACKAGES = ("megatron-minpro", "torch", "megatron-core", "transformers", "numpy")
_CPU_FACTS = Path("/proc/cpuinfo")
_GIT_S = 20.0
_COMMIT_LINE, _NO_COMMIT = "# branch.oid ", "(initial)"  # git-status(1), porcelain format version 2


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptVersions:
    """What one attempt ran with."""

    began: str  # local time
    global_step: int  # the first that it did
    versions: Mapping[str, str]  # name -> version, in the order in which they are shown


def installed_versions() -> dict[str, str]:
    """Python's, the packages' of this environment, and the commit of this program's checkout. What is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
        if package == "megatron-minpro" and (commit := checkout_commit(Path(megatron_minpro.__file__).parents[1])) is not None:
            found["commit"] = commit
    return found


def checkout_commit(folder: Path) -> str | None:
    """Twelve digits of the commit of a git checkout, with -dirty where files differ from it. None: the folder is no checkout's root.

    Only looks: `git describe --dirty` would write into the checkout, and leave its lock there where it is ended.
    """
    if not (folder / ".git").exists():  # a folder, or a file in a further working tree
        return None
    command = ["git", "--no-optional-locks", "-C", str(folder), "status"]
    command += ["--porcelain=v2", "--branch", "--no-ahead-behind", "--untracked-files=no"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):  # no git, or a slow file system
        return UNKNOWN
    lines = told.stdout.splitlines()
    commits = [line.removeprefix(_COMMIT_LINE) for line in lines if line.startswith(_COMMIT_LINE)]
    if told.returncode or commits in ([], [_NO_COMMIT]):
        return UNKNOWN
    return commits[0][:12] + ("" if all(line.startswith("#") for line in lines) else "-dirty")


def machine_facts() -> dict[str, str]:
    """Operating system and CPU of this machine."""
    return {"platform": platform.platform(), "cpu": _cpu_name()}


def _cpu_name() -> str:
    """As Linux says; elsewhere the architecture."""
    lines = _CPU_FACTS.read_text(encoding="utf-8").splitlines() if _CPU_FACTS.exists() else []
    names = [value.strip() for name, _, value in (line.partition(":") for line in lines) if name.strip() == "model name"]
    return names[0] if names else platform.machine()


def append_versions(run_dir: Path, *, global_step: int, versions: Mapping[str, str]) -> None:
    """Write the line of the attempt that begins now. Raises OSError where the disk is full; nothing of the line stays."""
    attempt = AttemptVersions(began=time.strftime("%F %T"), global_step=global_step, versions=versions)
    with closing(JsonLines(run_dir / VERSIONS_FILE)) as file:
        file.append(asdict(attempt))


def read_versions(run_dir: Path) -> list[AttemptVersions]:
    """The attempts in order; none where an older version of this program made the run.

    Raises:
        ValueError: a line is not of this file. The message names file and line.
    """
    path = run_dir / VERSIONS_FILE
    found = []
    for number, (_, line) in enumerate(read_json_lines(path), start=1):
        try:
            versions = {str(name): str(value) for name, value in line["versions"].items()}
            found.append(AttemptVersions(began=str(line["began"]), global_step=int(line["global_step"]), versions=versions))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path}:{number}: expected the versions of an attempt ({type(error).__name__}: {error})") from error
    return found
