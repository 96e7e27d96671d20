"""The rank pool itself: ranks see what torchrun would give them, and their failures are told with their own words."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.rank_pool import RankPool

pytestmark = pytest.mark.ranks


def script(folder: Path, code: str) -> Path:
    path = folder / "script.py"
    path.write_text(f"import os, sys, time\nrank = int(os.environ['RANK'])\n{code}\n")
    return path


def test_every_rank_runs_the_script_with_its_own_number(ranks: RankPool, tmp_path: Path) -> None:
    code = "open(f'{sys.argv[1]}/{rank}', 'w').write(os.environ['WORLD_SIZE'] + __name__)"
    ranks.run(script(tmp_path, code), tmp_path, world_size=3)
    assert [(tmp_path / str(rank)).read_text() for rank in range(3)] == ["3__main__"] * 3


def test_a_failing_rank_is_shown_and_ends_the_others(ranks: RankPool, tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(AssertionError, match=r"exit codes \[-9, 1\](.|\n)*rank 1:(.|\n)*ValueError: no such thing"):
        ranks.run(script(tmp_path, "if rank: raise ValueError('no such thing')\ntime.sleep(300)"), world_size=2)
    assert time.monotonic() - began < 200
    with pytest.raises(AssertionError, match=r"exit codes \[3\]"):
        ranks.run(script(tmp_path, "sys.exit(3)"), world_size=1)


def test_ranks_that_do_not_end_in_time_are_killed(ranks: RankPool, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"exit codes \[-9, -9\] \(-9: not done after 0\.5 s\)"):
        ranks.run(script(tmp_path, "time.sleep(300)"), world_size=2, timeout_s=0.5)
    ranks.run(script(tmp_path, "pass"), world_size=2)  # the pool goes on
