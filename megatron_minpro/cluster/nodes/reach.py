"""Whether this node reaches the others at the addresses that they gave, and sees their files in the run folder."""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_minpro.cluster.nodes.report import NodeReport, ReachReport

_CONNECT_S = 5.0
_POLL_S = 0.5
FOLDER = "preflight"


class Listener:
    """A port of this node that tells whoever connects the time, until it is closed."""

    def __init__(self, address: str) -> None:
        self._socket = socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def port(self) -> int:
        return self._socket.getsockname()[1]

    def close(self) -> None:
        self._socket.close()

    def _accept(self) -> None:
        try:
            while True:
                with self._socket.accept()[0] as connection:
                    connection.sendall(f"{time.time():.3f}\n".encode())
        except OSError:  # closed
            return


def leave_file(run_dir: Path, node: str) -> None:
    """Write what the other nodes must see. Raises OSError."""
    folder = run_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    (folder / node).write_text(f"{node} {os.getpid()}\n")


def remove_files(run_dir: Path) -> None:
    """The first node, at the end."""
    shutil.rmtree(run_dir / FOLDER, ignore_errors=True)


def try_to_reach(node: str, others: Mapping[str, NodeReport], run_dir: Path, *, until: float) -> ReachReport:
    """
    Args:
        node: this one.
        others: the reports of the others.
        run_dir: the run folder.
        until: how long files may take to appear (time.monotonic): network file systems show them late.
    """
    with ThreadPoolExecutor(32) as threads:
        answers = dict(zip(others, threads.map(lambda report: _ask_time(report.address, report.port), others.values()), strict=True))
    unseen = list(others)
    while unseen:
        seen = {path.name for path in (run_dir / FOLDER).iterdir()} if (run_dir / FOLDER).is_dir() else set()
        unseen = [other for other in unseen if other not in seen]
        if time.monotonic() > until:
            break
        if unseen:
            time.sleep(_POLL_S)
    return ReachReport(
        node=node,
        unreachable={other: answer for other, answer in answers.items() if isinstance(answer, str)},
        clocks_s={other: answer for other, answer in answers.items() if isinstance(answer, float)},
        unseen=tuple(unseen),
    )


def _ask_time(address: str, port: int) -> float | str:
    """How far the clock there is ahead, at least; or why nobody answers. The answer was made some time between question and arrival."""
    try:
        asked = time.time()
        with socket.create_connection((address, port), timeout=_CONNECT_S) as connection, connection.makefile() as lines:
            there = float(lines.readline())
        arrived = time.time()
    except OSError as error:
        return f"{address}: {error.strerror or error}"
    except ValueError:
        return f"{address}: the connection ended without an answer"
    return there - arrived if there > arrived else min(0.0, there - asked)
