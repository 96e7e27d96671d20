"""torch's writer of checkpoint shards, with the disk's own reason where a file cannot be written."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.utils.serialization import config

from checkpoints_convert.atomic_directory import fsync_path, write_file
from parallel.torch_checkpoint import FileSystem, FileSystemWriter


class ShardWriter(FileSystemWriter):
    """Writes small files too. Raises OSError naming the file; torch.save would say "unexpected pos 704 vs 598" for a full disk."""

    def __init__(self, directory: Path, small_files: Mapping[str, bytes]) -> None:
        """
        Args:
            directory: of the checkpoint.
            small_files: name -> content of what lies beside the shards.
        """
        super().__init__(directory)
        self.fs = self._disk = _Disk()
        self._directory = directory
        self._small_files = small_files

    def write_data(self, *arguments: Any, **options: Any) -> Any:
        """Called by torch on every rank."""
        for name, content in self._small_files.items():
            write_file(self._directory / name, content)
            fsync_path(self._directory / name)
        try:
            # torch.load checks no checksum, and computing them takes processor time for every byte.
            with config.patch({"save.compute_crc32": False}):  # type: ignore[attr-defined]  # torch makes it when the module is imported
                return super().write_data(*arguments, **options)
        except RuntimeError as error:
            if self._disk.trouble is None:
                raise
            raise self._disk.trouble from error


class _Disk(FileSystem):
    """Remembers why a file could not be written."""

    trouble: OSError | None = None

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[io.IOBase]:
        if "w" not in mode:
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        with io.BufferedWriter(_File(self, str(path))) as stream:
            yield stream


class _File(io.FileIO):
    def __init__(self, disk: _Disk, path: str) -> None:
        super().__init__(path, "wb")
        self._disk = disk

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self._disk.trouble = OSError(error.errno, error.strerror, self.name)
            raise self._disk.trouble from None
