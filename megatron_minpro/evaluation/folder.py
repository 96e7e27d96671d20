"""What lies where in an evaluation folder."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ATTEMPTS_FILE = "attempts.jsonl"  # one line per start: what was kept, what was torn
RESULTS_FILE = "results.json"
TABLES_FOLDER = "tables"
LOGS_FOLDER = "logs"
CONVERTED_FOLDER = "converted"  # the checkpoint in Hugging Face format, where it came in Megatron's


def problems_path(folder: Path, benchmark: str) -> Path:
    return folder / "problems" / f"{benchmark}.jsonl"


def responses_path(folder: Path, benchmark: str) -> Path:
    return folder / "responses" / f"{benchmark}.jsonl"


def grades_path(folder: Path, benchmark: str) -> Path:
    return folder / "grades" / f"{benchmark}.jsonl"


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
