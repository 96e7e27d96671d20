"""`replay.py` runs a short trace to its end: its actor and servers still have the interface that the loop uses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
SHORT = """
import json, sys
from dataclasses import asdict
from pathlib import Path
import replay
folder = Path(sys.argv[1])
replay.STEPS, replay.SCORE_S, replay.UPDATE_S, replay._TRACE = 4, 0.01, 0.02, folder / "trace.txt"
(folder / "rows.json").write_text(json.dumps([asdict(row) for row in replay.rows(folder)]))
"""


def test_a_short_trace_is_replayed_by_both_schedules(tmp_path: Path) -> None:
    (tmp_path / "trace.txt").write_text("0.02\n0.01\n" * 64)
    done = subprocess.run(
        [sys.executable, "-c", SHORT, str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{FOLDER}:{FOLDER.parents[1]}"},
    )
    assert done.returncode == 0, done.stderr
    overlapped, rolling = json.loads((tmp_path / "rows.json").read_text())
    assert "overlapped" in overlapped["name"] and "rolling" in rolling["name"]
    for row in (overlapped, rolling):
        assert row["seconds"] > row["peer_seconds"] >= 0.02, "no schedule is better than its ideal"
    for name in ("overlapped", "rolling"):
        lines = [json.loads(line) for line in (tmp_path / "replay" / name / "metrics.jsonl").read_text().splitlines()]
        assert [line["batch/lag_max"] for line in lines if "batch/lag_max" in line] == [0, 1, 1, 1]
