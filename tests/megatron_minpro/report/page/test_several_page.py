from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_minpro.report.page.several_page import several_page
from megatron_minpro.report.runs import read_run


def test_the_mean_of_seeds_has_a_t_interval_at_each_step(write_run: Callable[..., Path]) -> None:
    views = [
        read_run(write_run("one", rewards=(0.2, 0.4))),
        read_run(write_run("two", "seed=1", rewards=(0.4, 0.4))),
        read_run(write_run("rival", "objective.name=grpo", rewards=(0.5, 0.5))),
    ]
    found = several_page(views)
    assert found.groups == ["one and 1 more (2 seeds)", "rival"]
    rewards = [row for row in found.data["groups"] if row["metric"] == "reward/trained"]
    assert rewards[0] == {
        "group": "one and 1 more",
        "metric": "reward/trained",
        "global_step": 1,
        "mean": pytest.approx(0.3),
        "low": pytest.approx(0.3 - 1.27062, abs=1e-5),  # t of one degree of freedom is 12.7062, the standard error 0.1
        "high": pytest.approx(0.3 + 1.27062, abs=1e-5),
    }
    assert rewards[-1] == {"group": "rival", "metric": "reward/trained", "global_step": 2, "mean": 0.5}
    assert found.data["runs"][1] == {"run": "two", "group": "one and 1 more"}
    assert [chart.title for chart in found.charts] == ["Reward"]


def test_differences_are_paired_by_seed_against_the_first_runs_group(write_run: Callable[..., Path]) -> None:
    views = [read_run(write_run("a", rewards=(0.2, 0.4))), read_run(write_run("b", "objective.name=grpo", rewards=(0.2, 0.5)))]
    found = several_page(views)
    [against] = found.differences
    assert against.title == "b minus a"
    assert next(row.cells for row in against.rows if row.name == "reward, last") == ("+0.100", "-", "-", "1")
    settings = {row.name: row.cells for row in found.settings}
    assert settings["objective.name"] == ("minpro", "grpo")
