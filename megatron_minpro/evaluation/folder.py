"""The files of an evaluation folder."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ATTEMPTS_FILE = "attempts.jsonl"  # one line per start: what was kept, what was torn
RESULTS_FILE = "results.json"
TABLES_FOLDER = "tables"
LOGS_FOLDER = "logs"
RESCORING_FILE = "rescoring"  # there while new grades replace old ones: of which grader each file is, is not known then
CONVERTED_FOLDER = "converted"  # the checkpoint in Hugging Face format, where it came in Megatron's


def problems_path(folder: Path, benchmark: str) -> Path:
    return folder / "problems" / f"{benchmark}.jsonl"


def responses_path(folder: Path, benchmark: str) -> Path:
    return folder / "responses" / f"{benchmark}.jsonl"


def grades_path(folder: Path, benchmark: str) -> Path:
    return folder / "grades" / f"{benchmark}.jsonl"


def check_graded_alike(folder: Path) -> None:
    """Raises ValueError when a rescore was killed between two of its files."""
    if (folder / RESCORING_FILE).exists():
        raise ValueError(f"{folder}: a rescore was killed while its grades replaced the old ones; expected --rescore to be run again first")


@contextmanager
def ownership(folder: Path) -> Iterator[None]:
    """Only one process at a time writes into the folder. Raises ValueError when another one does."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--out {folder}: another process evaluates into it") from None
        yield
