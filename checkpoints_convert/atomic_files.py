"""A file that appears whole or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from checkpoints_convert.atomic_directory import fsync_path


def write_atomically(path: str | Path, data: str | bytes, *, durable: bool = True) -> None:
    """Write a temporary sibling, flush it to the disk, rename it over `path`, flush the directory entry.

    A reader sees the old content or the new one; a crash leaves one of them. str is written as UTF-8. The folder must exist.
    durable=False skips the two flushes: still never half a file, but a power cut may bring back the old one (heartbeats, plots).
    Raises OSError naming the file (a full disk among them); the temporary file is removed then.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    try:
        temporary.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
        if durable:
            fsync_path(temporary)
        os.replace(temporary, path)
    except OSError as error:  # write(2) knows no file name
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        fsync_path(path.parent)
