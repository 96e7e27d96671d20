"""Sums of metrics on two gloo ranks against sums written down by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.rank_pool import RankPool


@pytest.fixture(scope="module")
def seen(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank kept."""
    directory = tmp_path_factory.mktemp("reduction")
    ranks.run(Path(__file__).with_name("reduction_ranks.py"), directory, world_size=2)
    return [torch.load(directory / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def assert_sums(found: dict[str, torch.Tensor], expected: dict[str, Any]) -> None:
    assert {name: value.tolist() for name, value in found.items()} == expected
    assert {value.dtype for value in found.values()} == {torch.float64}


@pytest.mark.ranks
def test_all_ranks_learn_the_sum_over_ranks_in_double_precision(seen: list[dict[str, Any]]) -> None:
    expected: dict[str, Any] = {"loss": 3.0, "ratio": [2.0**24 + 1, 10.0], "bins": [[0, 2, 4], [6, 8, 10]]}
    for rank in seen:
        assert_sums(rank["both"], expected)
        doubled = {"loss": 6.0, "ratio": [2.0**25 + 2, 20.0], "bins": [[0, 4, 8], [12, 16, 20]]}
        assert_sums(rank["again"], doubled)


@pytest.mark.ranks
def test_a_rank_without_a_share_learns_the_sum_of_the_others(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert_sums(rank["one"], {"loss": 2.0, "ratio": [2.0**24, 10.0], "bins": [[0, 1, 2], [3, 4, 5]]})


@pytest.mark.ranks
def test_changed_names_or_shapes_are_refused_on_every_rank(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert rank["refusals"].keys() == {"name", "missing", "shape"}
        assert all(message.startswith("metrics changed between mini-batches: ") for message in rank["refusals"].values())
        assert "extra" in rank["refusals"]["name"]
