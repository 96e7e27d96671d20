"""A directory that appears whole or not at all: written under a temporary name beside its place, flushed to disk, then renamed."""

from __future__ import annotations

import ctypes
import errno
import fcntl
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
    destination = check_destination(destination, replace=replace)
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


@contextmanager
def resumable_directory(destination: str | Path, *, replace: bool, resume: bool) -> Iterator[Path]:
    """As `new_directory`, under the one name `.<name>.unfinished`, so that what a killed process did can be continued.

    With `resume` the directory is yielded as an earlier attempt left it, and an error leaves it for the next one. Without, it is
    yielded empty, and an error removes it. Raises ValueError also when another process is writing it.
    """
    destination = check_destination(destination, replace=replace)
    temporary = destination.with_name(f".{destination.name}.unfinished")
    if temporary.is_symlink():  # following it would empty another folder
        raise ValueError(f"{temporary}: is a link; expected an unfinished conversion, or nothing")
    temporary.mkdir(exist_ok=True)
    descriptor = _lock(temporary)
    try:
        if not resume:
            empty(temporary)
        keep = resume
        try:
            yield temporary
            fsync_tree(temporary)
            keep = False
            _move_into_place(temporary, destination, replace=replace)
            fsync_path(destination.parent)
        finally:
            if not keep and temporary.exists():
                shutil.rmtree(temporary)
    finally:
        os.close(descriptor)


def check_apart(source: Path, destination: Path) -> None:
    """Raises ValueError when one folder is the other or lies in it: replacing the destination would then delete the source."""
    inner, outer = destination.resolve(), source.resolve()
    if inner == outer or outer in inner.parents or inner in outer.parents:
        raise ValueError(f"{destination}: is, lies in or holds the source {source}; expected another place")


def check_replaceable(destination: Path) -> None:
    """Raises ValueError for a folder with content that is no checkpoint: a wrong name must not cost other work. An empty one may go."""
    marks = ("config.json", ".metadata")
    if destination.is_dir() and any(destination.iterdir()) and not any((destination / mark).is_file() for mark in marks):
        raise ValueError(
            f"{destination}: is to be replaced, but holds neither {' nor '.join(marks)}; expected a checkpoint or an empty folder"
        )


def check_destination(destination: str | Path, *, replace: bool) -> Path:
    destination = Path(os.path.abspath(destination))
    if not destination.parent.is_dir():
        raise ValueError(f"{destination.parent}: no such directory; expected the folder in which {destination.name} is to be written")
    if os.path.lexists(destination):
        if not replace:
            raise ValueError(f"{destination}: exists already; expected a new name, or the permission to replace it (--force)")
        if destination.is_symlink() or not destination.is_dir():
            raise ValueError(f"{destination}: is not a directory; expected a directory to replace")
    return destination


def _lock(directory: Path) -> int:
    """A descriptor that holds the directory for this process until it is closed."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), os.stat(directory)):  # its owner has just finished
            raise BlockingIOError
    except OSError as error:
        os.close(descriptor)
        raise ValueError(f"{directory}: another process is writing it; expected to be alone") from error
    return descriptor


def empty(directory: Path) -> None:
    """Delete what is in a directory."""
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def fsync_path(path: Path) -> None:
    """Flush one file, or the entries of one directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # fsync knows no file name, and some file systems report a full disk only here
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error
    finally:
        os.close(descriptor)


def mount_point(path: Path) -> Path:
    """Where the file system begins that an existing path lies on."""
    path = path.resolve()
    while not path.is_mount():
        path = path.parent
    return path


def write_file(path: Path, content: bytes) -> None:
    """Path.write_bytes, with the file's name in the error of a full disk."""
    try:
        path.write_bytes(content)
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


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
        aside = destination.with_name(f".{destination.name}.replaced-{secrets.token_hex(4)}")
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
