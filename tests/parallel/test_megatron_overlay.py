"""A later Megatron-Core than the pinned one, laid over the same environment, gives the same numbers.

The folder is what `make test` installs (pip install --target, without dependencies); MINPRO_MEGATRON_OVERLAY names another.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(600)]

VERSION = "0.19.2"
LAYOUTS = {
    "ep2": {"world_size": 2, "ep": 2},
    "tp2 sp": {"world_size": 2, "tp": 2, "sequence_parallel": True},
    "etp2": {"world_size": 2, "etp": 2},
    "pp2": {"world_size": 2, "pp": 2},
    "cp2": {"world_size": 2, "cp": 2},
    "pp2, 1 and 3 layers": {"world_size": 2, "pp": 2, "layers_in_first_stage": 1},
}


@pytest.fixture(scope="module")
def overlay() -> Path:
    """Where it is absent the tests are skipped; in CI that is a failure, so that nobody believes they ran."""
    folder = Path(os.environ.get("MINPRO_MEGATRON_OVERLAY", Path(sys.prefix) / f"megatron_core_{VERSION}"))
    if not (folder / "megatron/core").is_dir():
        reason = f"no megatron/core in {folder}; make overlay installs it"
        if os.environ.get("CI", "").lower() in ("1", "true"):
            pytest.fail(reason)
        pytest.skip(reason)
    return folder


@pytest.fixture(scope="module")
def results(
    overlay: Path,
    families: Callable,
    recipes: dict[str, dict],
    balanced_probe: dict,
    replaying_probe: dict,
    launch_actors: Callable,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, dict]:
    jobs = {name: (layout, {**recipes, "balanced": balanced_probe}) for name, layout in LAYOUTS.items()}
    jobs["ep2"][1]["reloaded"] = {**recipes["train"], "reload_before_step": 2}
    jobs["pp2"][1]["replay"] = replaying_probe
    return launch_actors(families("moe").directory, tmp_path_factory.mktemp("ranks"), jobs, python_path=(overlay,))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logprobs_gradients_and_steps_equal_transformers(
    layout: str, families: Callable, results: dict, check_parity: Callable, relative_error: Callable
) -> None:
    found = results[layout]["probe"].notes["megatron_core"]
    assert found.split("+")[0] == VERSION  # it appends the commit of the repository that its folder lies in
    check_parity(families("moe"), f"{layout}, megatron-core {VERSION}", results[layout])
    error, worst = relative_error(results[layout]["balanced"].gradients(), families("moe").balanced_gradients)
    assert error < 1e-5, worst


def test_a_checkpoint_continues_bit_for_bit(results: dict) -> None:
    assert results["ep2"]["reloaded"].reports == results["ep2"]["train"].reports


def test_given_experts_are_visited_in_a_pipeline(families: Callable, results: dict, check_replayed: Callable) -> None:
    check_replayed(families("moe"), f"pp2, replay, megatron-core {VERSION}", results["pp2"]["replay"])
