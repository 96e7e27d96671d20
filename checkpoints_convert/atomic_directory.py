"""A directory that appears whole or not at all: written under a temporary name beside its place, flushed to disk, then renamed."""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # linux/fs.h


@contextmanager
def new_directory(destination: str | Path, *, replace: bool) -> Iterator[Path]:
    """Yield an empty temporary directory; when the block ends without an error its content becomes `destination`.

    Every file in it is fsynced before the rename, and the parent directory after it. An error in the block removes the temporary
    directory and leaves `destination` as it was. A killed process leaves it as it was too, and beside it the unfinished
    `.<name>.partial-*`, which nothing ever reads. With `replace` an existing destination is exchanged in one step for the new one
    and then deleted.

    Raises ValueError at once when `destination` exists without `replace`, is not a directory, or has no parent directory.
    """
    destination = Path(os.path.abspath(destination))
    if not destination.parent.is_dir():
        raise ValueError(f"{destination.parent}: no such directory; expected the folder in which {destination.name} is to be written")
    if os.path.lexists(destination):
        if not replace:
            raise ValueError(f"{destination}: exists already; expected a new name, or the permission to replace it")
        if destination.is_symlink() or not destination.is_dir():
            raise ValueError(f"{destination}: is not a directory; expected a directory to replace")
    temporary = destination.with_name(f".{destination.name}.partial-{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        yield temporary
        fsync_tree(temporary)
        _move_into_place(temporary, destination, replace=replace)
        fsync_path(destination.parent)
    finally:
        # After an exchange the old content has the temporary name; after an error the unfinished content has it.
        if temporary.exists():
            shutil.rmtree(temporary)


def fsync_path(path: Path) -> None:
    """Flush one file, or the entries of one directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # fsync knows no file name, and some file systems report a full disk only here
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error
    finally:
        os.close(descriptor)


def fsync_tree(directory: Path) -> None:
    """Flush every file and every folder below `directory`, and itself: call it before renaming the folder into place."""
    for folder, _, names in os.walk(directory):
        for name in names:
            fsync_path(Path(folder) / name)
        fsync_path(Path(folder))


def _move_into_place(temporary: Path, destination: Path, *, replace: bool) -> None:
    if not os.path.lexists(destination):
        os.rename(temporary, destination)
    elif not replace:
        raise ValueError(f"{destination}: was created by another process meanwhile; expected it to be still absent")
    elif not _exchange(temporary, destination):
        # This file system cannot exchange two names. Between these two renames the destination is absent, its old content beside it.
        aside = temporary.with_name(temporary.name.replace(".partial-", ".replaced-"))
        os.rename(destination, aside)
        os.rename(temporary, destination)
        fsync_path(destination.parent)
        shutil.rmtree(aside)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step (Linux renameat2). False when the file system does not know how."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), os.fspath(first), None, os.fspath(second))
