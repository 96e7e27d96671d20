"""Which cases a study has, counted by hand, and that a folder belongs to one study."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_minpro.config import load_config
from megatron_minpro.scaling.study import Case, Settings, make_cases, open_study, read_study
from parallel.layout import ParallelLayout
from parallel.planner.models import FOLDER, read_shape

SHAPE = read_shape(FOLDER / "qwen3_30b_a3b.json")  # 128 experts, 48 layers
SETTINGS = Settings(routing="real", mean_tokens=120, warm_up=1, steps=2, hardware="cpu", imbalance=1.0)
CONFIG = Path(__file__).resolve().parents[3] / "configs/tiny_moe_cpu.yaml"


def cases(base: ParallelLayout, **options: object) -> list[Case]:
    usual = {"ep_sizes": (1, 2, 4), "world_sizes": (), "scalings": ("strong", "weak"), "sequences": 16}
    return make_cases(base, SHAPE, **{**usual, **options})


def test_the_fewest_ranks_hold_each_ep_and_weak_scaling_grows_the_work() -> None:
    found = cases(ParallelLayout(world_size=1))
    assert [(case.world_size, case.ep, case.sequences, case.scalings) for case in found] == [
        (1, 1, 16, ("strong", "weak")),  # where both begin, measured once
        (2, 2, 16, ("strong",)),
        (2, 2, 32, ("weak",)),
        (4, 4, 16, ("strong",)),
        (4, 4, 64, ("weak",)),
    ]
    assert all(case.problem is None for case in found)
    assert len({case.key for case in found}) == len(found)


def test_other_axes_set_the_fewest_ranks() -> None:
    """tp 2 x cp 2 needs 4 ranks for every ep up to 4, pp 2 doubles what an ep needs."""
    wide = ParallelLayout(world_size=4, tp=2, cp=2, sequence_parallel=True)
    assert [case.world_size for case in cases(wide, scalings=("strong",))] == [4, 4, 4]
    assert [case.world_size for case in cases(ParallelLayout(world_size=2, pp=2), scalings=("strong",))] == [2, 4, 8]


def test_given_ranks_are_combined_with_every_ep() -> None:
    found = cases(ParallelLayout(world_size=2), ep_sizes=(1, 2), world_sizes=(2, 4), scalings=("weak",))
    assert [(case.world_size, case.ep, case.sequences) for case in found] == [(2, 1, 16), (2, 2, 16), (4, 1, 32), (4, 2, 32)]


@pytest.mark.parametrize(
    ("base", "options", "problem"),
    [
        (ParallelLayout(world_size=1), {"ep_sizes": (3,)}, "ep=3 does not divide 128 experts"),
        (ParallelLayout(world_size=2), {"ep_sizes": (4,), "world_sizes": (2,)}, "world_size=2 is not a multiple of ep"),
        (ParallelLayout(world_size=5, pp=5), {"ep_sizes": (1,)}, "pp=5 does not divide 48 layers"),
        (ParallelLayout(world_size=1), {"ep_sizes": (4,), "sequences": 3}, "3 sequences leave some of 4 replicas without one"),
    ],
)
def test_what_cannot_run_says_why(base: ParallelLayout, options: dict[str, object], problem: str) -> None:
    [case] = cases(base, scalings=("strong",), **options)
    assert case.problem is not None and re.search(problem, case.problem)


def test_a_folder_is_taken_up_by_the_same_study_alone(tmp_path: Path) -> None:
    config = load_config(CONFIG, [])
    open_study(tmp_path, config, SETTINGS)
    open_study(tmp_path, config, SETTINGS)
    assert read_study(tmp_path) == (config, SETTINGS)
    with pytest.raises(ValueError, match="holds another study \\(steps: 2 there, 5 here\\)"):
        open_study(tmp_path, config, replace(SETTINGS, steps=5))
    with pytest.raises(ValueError, match="seed: 0 there, 3 here"):
        open_study(tmp_path, load_config(CONFIG, ["seed=3"]), SETTINGS)
