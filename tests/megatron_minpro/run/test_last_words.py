"""A rank that cannot go on ends at once, with exit code 1 and the reason in error.txt."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import asyncio, sys, threading, time
from pathlib import Path
from megatron_minpro.run.last_words import last_words

threading.Thread(target=time.sleep, args=(600,)).start()  # a thread that waits for a server
with last_words(Path(sys.argv[1]), rank=3):
    {statement}
"""


@pytest.mark.parametrize(
    ("statement", "line"),
    [
        ("raise ValueError('no such label')", "rank 3: ValueError: no such label\n"),
        ("sys.exit(0)", "rank 3: SystemExit: 0\n"),
        ("raise asyncio.CancelledError", "rank 3: CancelledError: at <string>:8\n"),
    ],
)
def test_whatever_ends_a_rank_leaves_its_reason(statement: str, line: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM.format(statement=statement), str(tmp_path)]
    assert subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 1
    assert (tmp_path / "error.txt").read_text() == line


def test_the_first_rank_to_fail_is_the_one_that_is_quoted(tmp_path: Path) -> None:
    (tmp_path / "error.txt").write_text("rank 0: ValueError: first\n")
    command = [sys.executable, "-c", PROGRAM.format(statement="raise ValueError('second')"), str(tmp_path)]
    assert subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 1
    assert (tmp_path / "error.txt").read_text() == "rank 0: ValueError: first\n"
