"""What a rank does not import, and that it is there when it is used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.rank_pool import RankPool

pytestmark = pytest.mark.ranks
DETERMINISTIC = 2  # torch.set_deterministic_debug_mode: an operator that is not raises


def test_a_rank_starts_without_sympy_and_torchs_compiler(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(Path(__file__).with_name("import_ranks.py"), tmp_path, world_size=2)
    for rank in range(2):
        seen = json.loads((tmp_path / f"{rank}.json").read_text())
        assert seen["large"] == [] and seen["mode"] == DETERMINISTIC
        # Sharded tensors, which use symbolic shapes, are as ever. 3 rows on 2 ranks: unequal shards.
        assert seen["rows"] == [[0, 2], [4, 6], [8, 10]]
        assert (seen["real"], seen["module"]) == (True, "torch.fx.experimental.symbolic_shapes")
