"""A study's file: cells, names, the order of settings, and one line for every mistake."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from megatron_minpro.cli import run
from megatron_minpro.config import ConfigError, load_config
from megatron_minpro.study.cells import Cell, make_cells, settings_of
from megatron_minpro.study.definition import read_study
from megatron_minpro.study.execution import check_cells
from megatron_minpro.study.smoke import covering, smoke_study

STUDY = """\
name: mine
base: tiny_moe_cpu
overrides: {num_global_steps: 9}
axes:
  objective:
    grpo: {objective.name: grpo}
    wide: {objective.name: cispo, objective.clip_high: 9.0, actor.optimizer.learning_rate: 1.0e-3}
  staleness: [0, 4]
cells:
  - {where: {objective: wide, staleness: 4}, set: {actor.optimizer.learning_rate: 2.0e-3}}
  - {where: {staleness: [4]}, set: {actor.optimizer.warm_up_steps: 1}}
seeds: [3, 7]
reference: {objective: grpo}
"""


def written(folder: Path, text: str = STUDY, **replaced: str) -> Path:
    for old, new in replaced.items():
        text = re.sub(rf"^{old}:.*(?:\n .*)*\n", new and f"{old}: {new}\n", text, flags=re.MULTILINE)
    path = folder / "study.yaml"
    path.write_text(text)
    return path


def cells_of(folder: Path, text: str = STUDY, **replaced: str) -> dict[str, Cell]:
    return {cell.name: cell for cell in make_cells(read_study(written(folder, text, **replaced)))}


def test_cells_are_all_combinations_seed_by_seed(tmp_path: Path) -> None:
    names = [f"{objective}_staleness{staleness}" for objective in ("grpo", "wide") for staleness in (0, 4)]
    assert list(cells_of(tmp_path)) == [f"{name}_seed{seed}" for seed in (3, 7) for name in names]


def test_settings_apply_from_base_to_rules(tmp_path: Path) -> None:
    cells = cells_of(tmp_path)
    found = {
        name: (config.num_global_steps, config.seed, config.staleness, config.actor.optimizer.learning_rate)
        for name, config in ((name, cell.config) for name, cell in cells.items())
        if config.seed == 7
    }
    base = load_config("tiny_moe_cpu").actor.optimizer.learning_rate
    assert found == {
        "grpo_staleness0_seed7": (9, 7, 0, base),
        "grpo_staleness4_seed7": (9, 7, 4, base),
        "wide_staleness0_seed7": (9, 7, 0, 1e-3),
        "wide_staleness4_seed7": (9, 7, 4, 2e-3),
    }
    assert [cell.config.actor.optimizer.warm_up_steps for cell in cells.values()] == [5, 1] * 4


def test_an_objective_by_name_has_its_published_options(tmp_path: Path) -> None:
    cells = cells_of(tmp_path)
    assert cells["grpo_staleness0_seed3"].config.objective.options == {}  # the base's are MinPRO's
    assert cells["wide_staleness0_seed3"].config.objective.options == {"clip_high": 9.0}


def test_run_folders_lie_in_the_studys_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cell = cells_of(tmp_path)["grpo_staleness0_seed3"]
    assert cell.config.run_dir == tmp_path / "runs/studies/mine/cells/grpo_staleness0_seed3"


def test_the_digest_is_of_what_changes_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = cells_of(tmp_path)["grpo_staleness0_seed3"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # another machine has another working folder
    here = cells_of(tmp_path, output_dir="x", seeds="[3]", overrides="{num_global_steps: 9, checkpoint.every: 3}")
    assert here["grpo_staleness0_seed3"].digest == first.digest
    other = cells_of(tmp_path, overrides="{num_global_steps: 10}")["grpo_staleness0_seed3"]
    assert other.digest != first.digest
    assert {key for key, value in other.settings.items() if first.settings[key] != value} == {"num_global_steps"}


def test_settings_have_neither_places_nor_schedules(tmp_path: Path) -> None:
    settings = settings_of(load_config("tiny_moe_cpu"))
    assert settings["model.path"] == "runs/base_models/tiny_moe"
    assert not {"name", "output_dir", "schedule", "rollout.servers", "world_size"} & set(settings)
    assert {"seed", "num_global_steps", "objective.clip_high", "rollout.group_size"} <= set(settings)
    assert "environment.name" not in settings and settings["objective.clip_high"] == 4.0, "defaults say nothing: a later version has more"


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"seeds": "[]"}, "study.yaml:12: seeds = []: expected at least one seed"),
    ({"seeds": "[1, 1]"}, "study.yaml:12: seeds = [1, 1]: expected every seed once"),
    ({"axes": "{stalenes: [0]}", "cells": "[]", "reference": "{}"}, "study.yaml:4: unknown key stalenes; did you mean staleness?"),
    ({"axes": "{staleness: []}", "cells": "[]", "reference": "{}"}, "study.yaml:4: axes.staleness = []: expected at least one level"),
    (
        {"axes": "{staleness: [2, 2]}", "cells": "[]", "reference": "{}"},
        "study.yaml:4: two cells are called staleness2_seed3: staleness 2 and staleness 2; expected levels with different names",
    ),
    ({"reference": "{objective: cispo}"}, "reference.objective = 'cispo': the axis has no such level; known: grpo, wide"),
    ({"reference": "{objectiv: grpo}"}, "reference.objectiv = 'grpo': no axis has this name; did you mean 'objective'?"),
    ({"overrides": "{num_global_stepz: 2}"}, "study.yaml:3: unknown key num_global_stepz; did you mean num_global_steps?"),
    ({"overrides": "{num_global_steps: 2}"}, "staleness = 4: expected at most num_global_steps = 2"),
    ({"name": "a/b"}, "study.yaml:1: name = 'a/b': expected match pattern"),
    ({"nam": "x"}, "unknown key nam; did you mean name?"),
    ({"base": "tiny_moe_gpu"}, "tiny_moe_gpu: no shipped configuration has this name; did you mean 'tiny_moe_cpu'?"),
]


@pytest.mark.parametrize(("replaced", "message"), MISTAKES, ids=[next(iter(replaced)) + str(i) for i, (replaced, _) in enumerate(MISTAKES)])
def test_a_mistake_is_one_line(replaced: dict[str, Any], message: str, tmp_path: Path) -> None:
    text = STUDY + "nam: x\n" if "nam" in replaced else STUDY
    with pytest.raises(ConfigError) as caught:
        make_cells(read_study(written(tmp_path, text, **replaced)))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mistake_ends_the_command_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, seeds="[]")
    assert run(["study", str(path)]) == 2
    assert capsys.readouterr().err.strip() == f"minpro: error: {path}:12: seeds = []: expected at least one seed"


def test_an_option_of_another_objective_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cells = make_cells(read_study(written(tmp_path, cells="[{where: {objective: wide}, set: {objective.budget: 0.04}}]")))
    with pytest.raises(ValueError, match=r"study\.yaml:9: objective\.budget = 0\.04: .*cispo") as caught:
        check_cells(cells)
    assert "\n" not in str(caught.value)


def test_smoke_runs_meet_every_level_and_rule_once(tmp_path: Path) -> None:
    text = STUDY.replace("staleness: [0, 4]", "staleness: [0, 1, 4]")
    runs = covering(read_study(written(tmp_path, text)))
    assert runs == [
        {"objective": "grpo", "staleness": "0"},
        {"objective": "wide", "staleness": "1"},
        {"objective": "grpo", "staleness": "4"},  # which the second rule is about
        {"objective": "wide", "staleness": "4"},  # for the first rule
    ]


def test_smoke_runs_are_short_and_reach_their_lag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path, STUDY + "smoke: {rollout.max_new_tokens: 20}\n", overrides="{num_global_steps: 90}")
    cells = make_cells(smoke_study(read_study(path)), smoke=True)
    assert [cell.name for cell in cells] == ["grpo_staleness0_seed3", "wide_staleness4_seed3"]
    configs = [cell.config for cell in cells]
    assert [config.num_global_steps for config in configs] == [2, 5]
    assert {(config.rollout.prompts_per_step, config.rollout.max_new_tokens, config.effective_schedule) for config in configs} == {
        (4, 20, "serial")
    }
    assert {config.run_dir.parent for config in configs} == {tmp_path / "runs/studies/mine_smoke/cells"}
    assert {config.model.path for config in configs} == {str(tmp_path / "runs/studies/mine_smoke/base_model")}


@pytest.mark.parametrize("name", ["lag_sweep_tiny", "lag_sweep_30b"])
def test_shipped_studies_are_valid(name: str) -> None:
    study = read_study(name)
    cells = make_cells(study)
    assert len(cells) == len(study.seeds) * 3 * len(study.axes["objective"])
    assert {cell.config.staleness for cell in cells} == {0, 2, 8}
    assert check_cells([cell for cell in cells if cell.seed == study.seeds[0]]) == (
        [] if name == "lag_sweep_tiny" else check_cells(cells[:1])
    )
