"""configs/README.md is what the fields say, and every field says something."""

from __future__ import annotations

import re
from collections.abc import Iterable

import pytest

from megatron_minpro.config import RunConfig, reference
from megatron_minpro.data.sources import ANSWER_FORMATS, PRESETS
from megatron_minpro.data.wrappers import WRAPPERS
from megatron_minpro.environments.environment import ENVIRONMENTS
from megatron_minpro.objectives.advantages import ESTIMATORS
from megatron_minpro.objectives.registry import OBJECTIVES
from megatron_minpro.rewards.registry import REWARDS
from megatron_minpro.run.weight_sync import WEIGHT_SYNCS
from megatron_minpro.tracking.tracker import TRACKERS


def test_the_settings_reference_is_current() -> None:
    assert reference.PAGE.read_text(encoding="utf-8") == reference.render(), "stale: make docs"


def test_every_setting_has_a_description_and_a_row() -> None:
    page = reference.render()
    for dotted, section in reference._sections(RunConfig, ""):
        for name, field in section.model_fields.items():
            assert field.description, f"{dotted}.{name}"
            assert f"| `{f'{dotted}.' if dotted else ''}{name}` |" in page


def test_rows_by_hand() -> None:
    page = reference.render()
    assert "| `rollout.max_retries` | integer >= 0 | `3` | resume | further attempts after a failed request |" in page
    assert "| `actor.optimizer.betas` | list |  |  | decay of the first and second moment |" in page
    assert "| `schedule` | `overlapped`, `serial` or null | `null` | resume |" in page


@pytest.mark.parametrize(
    ("key", "names"),
    [
        ("objective.name", OBJECTIVES.known),
        ("advantages.estimator", ESTIMATORS.known),
        ("environment.name", ENVIRONMENTS.known),
        ("reward.name", REWARDS.known),
        ("rollout.weight_sync", WEIGHT_SYNCS.known),
        ("tracking.trackers", TRACKERS.known),
        ("prompts.preset", PRESETS),
        ("prompts.answer_format", ANSWER_FORMATS),
        ("prompts.wrapper", WRAPPERS),
    ],
)
def test_the_row_of_a_choice_names_every_known_name(key: str, names: Iterable[str]) -> None:
    (row,) = re.findall(rf"^\| `{re.escape(key)}` \|.*$", reference.render(), re.MULTILINE)
    assert set(names) <= set(re.findall(r"\w+", row.split("|")[-2]))
