"""How a rank ends that cannot go on: at once, with exit code 1 and the reason in RUN_DIR/error.txt."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from checkpoints_convert.atomic_files import write_atomically
from megatron_minpro.run.run_folder import ERROR_FILE


@contextlib.contextmanager
def last_words(run_dir: Path, *, rank: int) -> Iterator[None]:
    """Whatever is raised inside ends this process. The launcher shows the line; the first rank to fail is the one that knows why.

    SystemExit too, which a user's reward may raise: a rank that left with exit code 0 would keep all others waiting.

    Args:
        run_dir: gets error.txt, unless it has one.
        rank: of this process.
    """
    try:
        yield
    except BaseException as error:
        traceback.print_exc()
        path = run_dir / ERROR_FILE
        if not path.exists():
            place = traceback.extract_tb(error.__traceback__)[-1]
            reason = str(error) or f"at {Path(place.filename).name}:{place.lineno}"
            with contextlib.suppress(OSError):  # a full disk; the launcher sees that for itself
                write_atomically(path, f"rank {rank}: {type(error).__name__}: {reason}\n")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # at once: a thread that waits for a server would hold this rank, and with it all others
