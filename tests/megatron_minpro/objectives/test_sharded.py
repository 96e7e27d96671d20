"""Every objective on four gloo ranks, cp 4 and cp 2 x dp 2, gives the loss, gradient, weights and metrics of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.megatron_minpro.objectives.variants import VARIANTS, make
from tests.rank_pool import RankPool


@pytest.mark.ranks
def test_four_ranks_equal_one_for_every_objective(cases, run_objective, ranks: RankPool, tmp_path: Path) -> None:
    # Wide enough to clip, narrow enough that no token of this seed lies on a gate.
    case = cases.random(11, 0.6).corrected()
    torch.save(vars(case), tmp_path / "case.pt")
    ranks.run(Path(__file__).with_name("sharded_ranks.py"), tmp_path, world_size=4)

    for cp_size in (4, 2):
        outputs = [torch.load(tmp_path / f"cp{cp_size}_rank{rank}.pt", weights_only=True) for rank in range(4)]
        for name in VARIANTS:
            expected = run_objective(make(name), case)
            outs = [rank[name] for rank in outputs]
            # A sum of terms around 0.1 that nearly cancel: absolute in fp32.
            assert sum(out["loss"] for out in outs) == pytest.approx(expected.loss, rel=1e-5, abs=2e-7)
            assert all(out["collectives"] == ["all_gather_into_tensor"] for out in outs), "one in forward, none in backward"
            for s in range(len(case.masks)):
                held = [out for out in outs if s in out["gradients"]]
                assert len(held) == cp_size
                for out in held:
                    torch.testing.assert_close(out["gradients"][s], expected.gradients[s], rtol=1e-5, atol=1e-8)
                    torch.testing.assert_close(out["weights"][s], expected.weights[s], rtol=1e-5, atol=1e-7)
            for metric, value in expected.metrics.items():
                total = sum(out["metrics"][metric] for out in outs)
                torch.testing.assert_close(total, value, rtol=1e-5, atol=1e-6, msg=lambda m, n=f"{name} {metric}": f"{n}: {m}")
