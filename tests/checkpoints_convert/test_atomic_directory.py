from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoints_convert import atomic_directory
from checkpoints_convert.atomic_directory import new_directory, resumable_directory


def fill(directory: Path, content: str) -> None:
    for number in range(20):
        (directory / f"file_{number}").write_text(content)
    (directory / "inner").mkdir()
    (directory / "inner" / "file").write_text(content)


def contents(directory: Path) -> set[str]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert len(files) == 21
    return {path.read_text() for path in files}


def test_directory_appears_with_all_it_holds(tmp_path: Path) -> None:
    with new_directory(tmp_path / "out", replace=False) as temporary:
        fill(temporary, "new")
        assert not (tmp_path / "out").exists()
    assert contents(tmp_path / "out") == {"new"}
    assert os.listdir(tmp_path) == ["out"]


def test_existing_directory_is_kept_unless_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    fill(tmp_path / "out", "old")
    with pytest.raises(ValueError, match="out: exists already"), new_directory(tmp_path / "out", replace=False):
        pytest.fail("the block must not run")
    assert contents(tmp_path / "out") == {"old"}
    with new_directory(tmp_path / "out", replace=True) as temporary:
        fill(temporary, "new")
        assert contents(tmp_path / "out") == {"old"}
    assert contents(tmp_path / "out") == {"new"}
    assert os.listdir(tmp_path) == ["out"]


def test_file_system_without_exchange_still_replaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic_directory, "_exchange", lambda first, second: False)
    (tmp_path / "out").mkdir()
    fill(tmp_path / "out", "old")
    with new_directory(tmp_path / "out", replace=True) as temporary:
        fill(temporary, "new")
    assert contents(tmp_path / "out") == {"new"}
    assert os.listdir(tmp_path) == ["out"]


def test_directory_created_by_another_process_meanwhile_is_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="by another process"), new_directory(tmp_path / "out", replace=False) as temporary:
        fill(temporary, "new")
        (tmp_path / "out").mkdir()
        fill(tmp_path / "out", "theirs")
    assert contents(tmp_path / "out") == {"theirs"}
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_error_in_the_block_leaves_the_old_state(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "out").mkdir()
    fill(tmp_path / "out", "old")
    with pytest.raises(type(error)), new_directory(tmp_path / "out", replace=True) as temporary:
        fill(temporary, "new")
        raise error
    assert contents(tmp_path / "out") == {"old"}
    assert os.listdir(tmp_path) == ["out"]


def test_disk_that_fills_up_while_flushing_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*weights"), new_directory(tmp_path / "out", replace=False) as temporary:
        (temporary / "weights").write_text("new")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("prepare", [Path.touch, lambda path: path.symlink_to("elsewhere")], ids=["file", "symlink"])
def test_only_a_real_directory_is_replaced(tmp_path: Path, prepare: Callable[[Path], None]) -> None:
    prepare(tmp_path / "out")
    with pytest.raises(ValueError, match="out: is not a directory"), new_directory(tmp_path / "out", replace=True):
        pytest.fail("the block must not run")
    assert os.listdir(tmp_path) == ["out"]


def test_absent_parent_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="absent: no such directory"), new_directory(tmp_path / "absent" / "out", replace=False):
        pytest.fail("the block must not run")


def test_result_has_the_permissions_of_an_ordinary_directory(tmp_path: Path) -> None:
    (tmp_path / "ordinary").mkdir()
    with new_directory(tmp_path / "out", replace=False):
        pass
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


@pytest.mark.parametrize("kind", ["new", "resumable"])
def test_file_systems_that_cannot_exchange_names_replace_too(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic_directory, "_exchange", lambda first, second: False)
    (tmp_path / "out").mkdir()
    fill(tmp_path / "out", "old")
    made = new_directory(tmp_path / "out", replace=True)
    if kind == "resumable":
        made = resumable_directory(tmp_path / "out", replace=True, resume=False)
    with made as temporary:
        fill(temporary, "new")
    assert contents(tmp_path / "out") == {"new"}
    assert os.listdir(tmp_path) == ["out"]


def _replace_for_ever(destination: Path) -> None:
    for number in range(10**9):
        with new_directory(destination, replace=True) as temporary:
            fill(temporary, str(number % 10))


def test_process_killed_at_any_moment_leaves_one_complete_directory(tmp_path: Path) -> None:
    destination = tmp_path / "out"
    destination.mkdir()
    fill(destination, "old")
    for round_number in range(8):
        writer = multiprocessing.get_context("fork").Process(target=_replace_for_ever, args=(destination,))
        writer.start()
        time.sleep(0.05 + 0.017 * round_number)
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        assert writer.exitcode == -signal.SIGKILL
        assert len(contents(destination)) == 1
        assert all(name == "out" or name.startswith(".out.partial-") for name in os.listdir(tmp_path))


def test_every_file_and_folder_of_a_tree_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/c").write_text("x")
    flushed: list[str] = []
    monkeypatch.setattr(atomic_directory, "fsync_path", lambda target: flushed.append(os.path.relpath(target, tmp_path)))
    atomic_directory.fsync_tree(tmp_path)
    assert sorted(flushed) == [".", "a", "a/b", "a/b/c"]
