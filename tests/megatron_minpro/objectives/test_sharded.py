"""Every objective on four gloo ranks, cp 4 and cp 2 x dp 2, gives the loss, gradient, weights and metrics of one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.megatron_minpro.objectives.variants import VARIANTS, make
from tests.rank_pool import RankPool


@pytest.mark.ranks
def test_four_ranks_equal_one_for_every_objective(cases, run_objective, ranks: RankPool, tmp_path: Path) -> None:
    # Wide enough to clip, narrow enough that no token of this seed lies on a gate.
    case = cases.random(11, 0.6).corrected()
    centred = replace(case, corrections=None).centred()
    torch.save({**vars(case), "top": centred.top}, tmp_path / "case.pt")
    ranks.run(Path(__file__).with_name("sharded_ranks.py"), tmp_path, world_size=4)

    for cp_size in (4, 2):
        outputs = [torch.load(tmp_path / f"cp{cp_size}_rank{rank}.pt", weights_only=True) for rank in range(4)]
        assert sorted(outputs[0]) == sorted([*VARIANTS, *(f"{name} centred" for name in VARIANTS if make(name).centers_scores)])
        for name in outputs[0]:
            is_centred, objective = name.endswith(" centred"), make(name.removesuffix(" centred"))
            expected = run_objective(objective, centred if is_centred else case)
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
                    for k, gradients in enumerate(out["top_gradients"]):
                        torch.testing.assert_close(gradients[s], expected.top_gradients[s][:, k], rtol=1e-5, atol=1e-8)
            assert not is_centred or (len(outs[0]["top_gradients"]) == 3 and "centering/drift" in expected.metrics)
            for metric, value in expected.metrics.items():
                total = sum(out["metrics"][metric] for out in outs)
                torch.testing.assert_close(total, value, rtol=1e-5, atol=1e-6, msg=lambda m, n=f"{name} {metric}": f"{n}: {m}")
