"""`minpro convert` given arguments or a destination that are wrong, a full disk, or a kill: nothing that was there is touched."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_minpro import cli

REPOSITORY = Path(__file__).resolve().parents[2]
Spoil = Callable[[Path], object]


def snapshot(folder: Path) -> dict[str, Any]:
    """Everything below a folder: files with their bytes, and other names."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def source(good: Path, tmp_path: Path) -> Path:
    """A copy that may be lost."""
    return Path(shutil.copytree(good, tmp_path / "model"))


@pytest.mark.parametrize(
    "case, needle",
    [
        ("existing folder", "out: exists already"),
        ("existing file", "out: exists already"),
        ("dangling link", "out: exists already"),
        ("absent parent", "nowhere: no such directory"),
        ("parent is a file", "file: no such directory"),
    ],
)
def test_unusable_destination_is_refused_and_untouched(
    case: str, needle: str, good: Path, tmp_path: Path, check_refused: Callable[..., None]
) -> None:
    out = tmp_path / "out"
    if case == "existing folder":
        out.mkdir()
        (out / "precious").write_text("mine")
    elif case == "existing file":
        out.write_text("mine")
    elif case == "dangling link":
        out.symlink_to(tmp_path / "nothing")
    elif case == "absent parent":
        out = tmp_path / "nowhere" / "out"
    else:
        (tmp_path / "file").write_text("mine")
        out = tmp_path / "file" / "out"
    before = snapshot(tmp_path)
    check_refused(["hf-to-megatron", str(good), str(out)], (needle,))
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("destination", ["model", "model/inside", ".", "link", "link/inside"])
@pytest.mark.parametrize("command", ["hf-to-megatron", "megatron-to-hf"])
def test_force_never_touches_the_source(
    command: str, destination: str, source: Path, megatron: Path, tmp_path: Path, check_refused: Callable[..., None]
) -> None:
    # The destination is the source, lies inside it, or holds it; or is a link to it.
    if command == "megatron-to-hf":
        shutil.rmtree(source)
        shutil.copytree(megatron, source)
    (tmp_path / "link").symlink_to(source)
    before = snapshot(tmp_path)
    check_refused([command, str(source), str(tmp_path / destination), "--force"], ())
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "arguments, needle",
    [
        (["hf-to-megatron", "absent", "out"], "absent"),
        (["hf-to-megatron", "empty", "out"], "config.json"),
        (["hf-to-megatron", "file", "out"], "file"),
        (["megatron-to-hf", "absent", "out"], "absent"),
        (["megatron-to-hf", "empty", "out"], "empty"),
        (["verify", "empty", "empty"], "empty"),
        (["verify", "absent", "empty"], "absent"),
        (["inspect", "empty"], "empty"),
        (["inspect", "absent"], "absent"),
        (["inspect", "file"], "file"),
        (["inspect"], "PATH"),
        (["hf-to-megatron", "empty"], "DST"),
        (["hf-to-megatron", "empty", "out", "--workers", "0"], "--workers"),
        (["hf-to-megatron", "empty", "out", "--worker", "2"], "--worker"),
        (["hf-to-megatron", "empty", "out", "--workers", "two"], "--workers"),
        (["megatron-to-hf", "empty", "out", "--shard-size", "0GB"], "0GB"),
        (["megatron-to-hf", "empty", "out", "--shard-size", "4XB"], "4XB"),
        (["megatron-to-hf", "empty", "out", "--dtype", "int8"], "int8"),
        (["megatron-to-hf", "empty", "out", "--config", "absent"], "absent"),
        (["megatron-to-hg", "empty", "out"], "megatron-to-hg"),
        (["quantize", "empty", "out", "--format", "fp9", "--prompts", "p.jsonl", "--field", "x"], "fp9"),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: list[str], needle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check_refused: Callable[..., None]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("file").write_text("text")
    check_refused(arguments, (needle,))
    assert sorted(os.listdir()) == ["empty", "file"]


def unfinished_file(folder: Path) -> None:
    (folder / ".out.unfinished").write_text("mine")


def unfinished_link(folder: Path) -> None:
    (folder / "precious").mkdir()
    (folder / "precious" / "file").write_text("mine")
    (folder / ".out.unfinished").symlink_to(folder / "precious")


def unfinished_journal(content: bytes) -> Spoil:
    return lambda folder: ((folder / ".out.unfinished").mkdir(), (folder / ".out.unfinished" / "journal.jsonl").write_bytes(content))


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("spoil", [unfinished_file, unfinished_link])
def test_what_is_no_unfinished_conversion_is_not_touched(
    spoil: Spoil, resume: bool, good: Path, tmp_path: Path, check_refused: Callable[..., None]
) -> None:
    spoil(tmp_path)
    before = snapshot(tmp_path)
    check_refused(["hf-to-megatron", str(good), str(tmp_path / "out"), *["--resume"] * resume], (".out.unfinished",))
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "content",
    [
        b"noise\n",
        b"\xff\xfe\n",
        b"[1, 2]\n",
        b'{"fingerprint": "another source"}\n',
        b'{"fingerprint": "another source"}\n["x", {"x": 1}]\n',
    ],
)
def test_a_journal_of_something_else_is_not_continued(
    content: bytes, good: Path, tmp_path: Path, check_refused: Callable[..., None]
) -> None:
    unfinished_journal(content)(tmp_path)
    check_refused(["hf-to-megatron", str(good), str(tmp_path / "out"), "--resume"], (".out.unfinished",))
    assert not (tmp_path / "out").exists()


def test_swapped_formats_are_named(good: Path, megatron: Path, tmp_path: Path, check_refused: Callable[..., None]) -> None:
    check_refused(["megatron-to-hf", str(good), str(tmp_path / "out")], (str(good),))
    check_refused(["hf-to-megatron", str(megatron), str(tmp_path / "out")], (str(megatron),))
    assert os.listdir(tmp_path) == []


def test_files_may_be_links_as_in_the_hub_cache(good: Path, tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    for path in good.iterdir():
        (tmp_path / "links" / path.name).symlink_to(path)
    assert cli.run(["convert", "hf-to-megatron", str(tmp_path / "links"), str(tmp_path / "out")]) == 0
    assert cli.run(["convert", "verify", str(good), str(tmp_path / "out")]) == 0


def test_a_folder_that_cannot_be_written_is_named(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # /proc refuses new names even to root, whom no permission bits stop.
    assert cli.run(["convert", "hf-to-megatron", str(good), "/proc/out"]) in (1, 2)
    error = capsys.readouterr().err
    assert "/proc" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("command", ["hf-to-megatron", "megatron-to-hf"])
def test_full_disk_is_one_line_and_leaves_nothing(
    command: str, good: Path, megatron: Path, small_disk: Callable[[int], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    disk = small_disk(64 << 10)  # the checkpoint needs 110 kB
    code = cli.run(["convert", command, str(good if command == "hf-to-megatron" else megatron), str(disk / "out")])
    error = capsys.readouterr().err
    assert code in (1, 2), error
    assert str(disk) in error and "space" in error.lower() and len(error.splitlines()) == 1
    assert os.listdir(disk) == []


@pytest.mark.parametrize("delay_s", [0.0, 0.02, 0.05, 0.1, 0.2])
def test_killed_conversion_leaves_no_destination_and_can_be_resumed(delay_s: float, many: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "megatron_minpro.cli", "convert", "hf-to-megatron", str(many), str(out), "--workers", "1"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / ".out.unfinished").exists() and not out.exists():
        time.sleep(0.002)
    time.sleep(delay_s)
    process.send_signal(signal.SIGKILL)
    assert process.wait() in (0, -signal.SIGKILL)
    if not out.exists():
        assert cli.run(["convert", "hf-to-megatron", str(many), str(out), "--resume"]) == 0
    assert cli.run(["convert", "verify", str(many), str(out)]) == 0  # also where it was faster than the signal
    assert sorted(os.listdir(tmp_path)) == ["out"]
