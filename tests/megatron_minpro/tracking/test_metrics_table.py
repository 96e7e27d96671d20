from __future__ import annotations

import pytest

from megatron_minpro.tracking import metrics_reference
from megatron_minpro.tracking.metrics_table import METRICS, check_declared


def test_every_name_is_declared_once_and_has_a_group() -> None:
    names = [metric.name for metric in METRICS]
    assert len(names) == len(set(names))
    assert all(name.count("/") == 1 for name in names)


def test_a_name_tells_a_logarithm_from_a_ratio() -> None:
    for metric in METRICS:
        group = metric.name.partition("/")[0]
        if group.startswith("log_"):
            assert metric.unit.startswith("nats")
        elif group in ("ratio", "prefix_min"):
            assert metric.unit in ("ratio", "fraction")


def test_every_metric_names_the_file_that_computes_it() -> None:
    packages = metrics_reference.PAGE.parents[2]
    for metric in METRICS:
        root = packages if metric.source.startswith(("rollout/", "parallel/")) else packages / "megatron_minpro"
        assert (root / metric.source).is_file(), metric


def test_the_reference_page_is_current() -> None:
    assert metrics_reference.PAGE.read_text(encoding="utf-8") == metrics_reference.render(), (
        "stale: python -m megatron_minpro.tracking.metrics_reference"
    )


@pytest.mark.parametrize(
    ("name", "near"), [("prefix_min/p50", "prefix_min/mean"), ("batch/lag_mn", "batch/lag_min"), ("reward", "reward/errors")]
)
def test_a_name_that_is_not_declared_is_refused_with_the_nearest_one(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"^metric '{name}' is not declared in .*{near}"):
        check_declared(["reward/trained", name])


def test_a_plug_in_may_log_names_of_its_own_under_custom() -> None:
    check_declared(["custom/anything", "reward/trained"])
