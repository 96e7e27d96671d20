"""Runs beside each other, worked by hand. t(0.975, 1 degree) = 12.7062; of two values the error of the mean is half their gap."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_minpro.report.comparison import compare
from megatron_minpro.report.runs import read_run

T1 = 12.706204736


def test_seeds_are_groups_with_intervals_and_paired_differences(write_run: Callable[..., Path]) -> None:
    views = [
        read_run(write_run(f"{name}_seed{seed}", f"objective.name={name}", f"seed={seed}", rewards=(0.1, last)))
        for name, seed, last in (("grpo", 1, 0.2), ("grpo", 2, 0.4), ("cispo", 2, 0.5), ("cispo", 1, 0.5), ("cispo", 3, 0.9))
    ]
    found = compare(views)
    grpo, cispo = found.groups
    assert (grpo.name, list(grpo.runs), cispo.name, list(cispo.runs)) == ("grpo", [1, 2], "cispo", [2, 1, 3])
    assert found.reference is grpo and list(found.notes) == []
    interval = grpo.interval("reward_last")
    assert interval is not None and interval.mean == pytest.approx(0.3)
    assert (interval.low, interval.high) == (pytest.approx(0.3 - T1 * 0.1), pytest.approx(0.3 + T1 * 0.1))
    (last,) = [each for each in found.differences if each.measure == "reward_last"]
    assert last.group is cispo and last.difference.interval.count == 2, "seed 3 has no partner"
    assert last.difference.interval.mean == pytest.approx(0.2)  # 0.3 and 0.1
    assert last.difference.interval.high == pytest.approx(0.2 + T1 * 0.1)
    assert found.differing["objective.name"] == ["grpo", "grpo", "cispo", "cispo", "cispo"]
    assert found.differing["seed"] == [1, 2, 2, 1, 3]
    assert "name" not in found.differing and "rollout.group_size" not in found.differing


def test_measures_of_a_run_by_hand(write_run: Callable[..., Path]) -> None:
    (run,) = compare([read_run(write_run("a"))]).runs
    expected = {"reward_first": 0.25, "reward_last": 0.5, "reward_best": 0.5, "pass_at_1_before": 0.25, "pass_at_1_after": 0.375}
    expected |= {"pass_at_1_best": 0.5, "lag": 3.0, "tokens_per_s": 200 / 5, "step_s": 2.0, "seconds": 5.0}
    assert {name: run.measures[name] for name in expected} == pytest.approx(expected)


def test_two_runs_of_the_same_settings_and_seed_are_compared(write_run: Callable[..., Path]) -> None:
    old, new = read_run(write_run("old", rewards=(0.1, 0.25))), read_run(write_run("new", "world_size=1", "parallel.ep=1"))
    found = compare([old, new], reference=new)
    assert [group.name for group in found.groups] == ["old", "new"]
    (last,) = [each for each in found.differences if each.measure == "reward_last"]
    assert (last.group.name, last.difference.interval.mean, last.difference.interval.low) == ("old", -0.25, None)
    assert set(found.differing) == {"world_size", "parallel.ep"}, "a layout is shown, though it makes no group"


def test_what_is_missing_is_said_of_the_run(write_run: Callable[..., Path]) -> None:
    older, fresh = write_run("older", complete=False), write_run("fresh", "seed=9", "objective.name=grpo", rewards=(), complete=None)
    (older / "config.yaml").unlink()
    found = compare([read_run(older), read_run(fresh)])
    assert list(found.notes) == [
        "older: stopped, after 3 global steps",
        "older: config.yaml: missing; settings are not known",
        "fresh: running or killed, after 1 global steps",
        "fresh: no batch was trained",
        "fresh: no seed in common with older, so no difference",
    ]
    assert found.differing == {} and found.differences == [] and found.runs[1].measures == {}
    assert [list(group.runs) for group in found.groups] == [[-1], [9]]


def test_runs_of_one_name_are_told_apart_by_their_paths(write_run: Callable[..., Path], tmp_path: Path) -> None:
    first = write_run("a")
    second = first.rename(tmp_path / "b")  # its configuration still says a
    first = write_run("a")
    found = compare([read_run(first), read_run(second)])
    assert [run.label for run in found.runs] == [str(first), str(second)]
    with pytest.raises(ValueError, match=rf"^{first}: given twice; expected every run once$"):
        compare([read_run(first), read_run(first)])
    with pytest.raises(ValueError, match="at least one run"):
        compare([])
