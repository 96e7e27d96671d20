"""Rows of a prompt source: JSON lines, a JSON list, parquet, or a Hugging Face data set."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

from megatron_minpro.registry import nearest

Row = Mapping[str, Any]
Rows = Iterator[tuple[str, Row]]

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_LOAD_DATASET_OPTIONS = ("split", "name", "revision")
# Endings that no name of a data set has: such a source is meant as a file.
_UNREADABLE = (".csv", ".tsv", ".txt", ".xlsx", ".arrow", ".feather", ".pkl", ".zip", ".gz", ".zst", ".yaml", ".yml", ".xml")


def read_rows(source: str, options: dict[str, Any], *, key: str = "prompts.source") -> Rows:
    """(where, row) pairs, one after the other: a file may hold millions. `where` names the row in error messages.

    Args:
        source: the path of a file, or owner/name of a Hugging Face data set.
        options: of a data set: `split` (required), `name`, `revision`. A file has none.
        key: the setting that named the source, for error messages.

    Raises:
        ValueError: naming the key or the row, for what cannot be found or read.
    """
    if is_file(source):
        check_file(source, key=key)
        if options:
            raise ValueError(f"prompts.options {sorted(options)} have no meaning for a file ({source}); remove them")
        return _FORMATS[_ending(source)](Path(source))
    if not is_source_of_rows(source):
        raise ValueError(f"{key} = {source!r}: neither {_EXPECTED} nor a Hugging Face data set (owner/name)")
    return _read_hub(source, options, key=key)


def is_file(source: str) -> bool:
    """Whether the source is meant as a path: it has a file's ending, begins as a path does, or is a file."""
    ending = Path(source).suffix.lower()
    return _ending(source) in _FORMATS or ending in _UNREADABLE or source.startswith(("/", "./", "../", "~")) or Path(source).is_file()


def is_source_of_rows(source: str) -> bool:
    """Whether the source is meant as a path or named as a data set is."""
    return is_file(source) or _HUB_NAME.fullmatch(source) is not None


def check_file(source: str, *, key: str) -> None:
    """Raises ValueError, naming the key, for a file that is not there or not of a kind that is read."""
    ending = _ending(source)
    if ending not in _FORMATS:
        what = "is a folder" if Path(source).is_dir() else f"{ending or 'no file ending'} is not read"
        raise ValueError(f"{key} = {source!r}: {what}; expected {_EXPECTED}")
    if not Path(source).is_file():
        raise ValueError(f"{key} = {source!r}: no such file")


def source_name(source: str) -> str:
    """A file's name without its ending; a data set's name as it is."""
    return Path(source).name[: -len(_ending(source))] if _ending(source) in _FORMATS else source


def _ending(source: str) -> str:
    """In lower case; with .gz the ending before it too."""
    name = Path(source).name.lower()
    return next((ending for ending in _FORMATS if name.endswith(ending)), Path(name).suffix)


def _read_json_lines(path: Path) -> Rows:
    number = 0
    try:
        with _opened(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}: line {number}", _object(line, f"{path}: line {number}")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file after line {number}: {error}") from error


def _read_json(path: Path) -> Rows:
    """One list of objects. Many .json files are JSON lines; they are read as such."""
    try:
        with _opened(path) as file:
            text = file.read()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file: {error}") from error
    if not text.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        yield from _read_json_lines(path)
        return
    try:
        rows = json.loads(text.decode("utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{path}: item {number} is a {type(row).__name__}, expected a JSON object")
        yield f"{path}: item {number}", row


def _opened(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if path.name.lower().endswith(".gz") else path.open("rb")


def _object(text: bytes, where: str) -> Row:
    try:
        row = json.loads(text.decode("utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where} is a {type(row).__name__}, expected a JSON object")
    return row


def _read_parquet(path: Path) -> Rows:
    import pyarrow  # here: not needed by generators and JSON lines, and slow to import
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    yield f"{path}: row {number}", row
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable parquet file: {str(error).splitlines()[0]}") from error


def _read_hub(source: str, options: dict[str, Any], *, key: str) -> Rows:
    for option in options:
        if option not in _LOAD_DATASET_OPTIONS:
            raise ValueError(f"prompts.options: {option!r} is unknown for a Hugging Face dataset; {nearest(option, _LOAD_DATASET_OPTIONS)}")
    if "split" not in options:
        raise ValueError(f"prompts.options.split is needed to read the Hugging Face dataset {source!r} (e.g. split: train)")
    import datasets  # here: takes seconds to import

    try:
        dataset = datasets.load_dataset(source, **options)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{key} = {source!r} with options {options}: {reason}") from error
    for number, row in enumerate(dataset):
        yield f"{source}: row {number}", row


# Endings in lower case; the longer ones first.
_FORMATS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl.gz": _read_json_lines,
    ".json.gz": _read_json,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
_EXPECTED = "a .jsonl, .jsonl.gz, .json or .parquet file"
