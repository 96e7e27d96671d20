from __future__ import annotations

from pathlib import Path

import pytest

from checkpoints_convert import atomic_files
from checkpoints_convert.atomic_files import write_atomically


def test_text_and_bytes_arrive_and_replace_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, "naïve")
    assert path.read_bytes() == "naïve".encode()
    write_atomically(path, b"\x00\x01")
    assert path.read_bytes() == b"\x00\x01"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")

    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic_files, "fsync_path", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_content_is_on_disk_before_the_name_and_that_before_the_return(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    flushed: list[tuple[bool, bool]] = []  # (is the folder, the name exists already)
    monkeypatch.setattr(atomic_files, "fsync_path", lambda target: flushed.append((Path(target) == tmp_path, path.exists())))
    write_atomically(path, "x")
    assert flushed == [(False, False), (True, True)]
