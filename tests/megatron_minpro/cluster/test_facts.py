"""What is wrong with a job's nodes, from their reports."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_minpro.cluster.checks import missing_paths, problems
from megatron_minpro.cluster.facts import NodeReport, describe_node
from megatron_minpro.config import load_config

REPOSITORY = Path(__file__).resolve().parents[3]
CLOCK = 1_700_000_000.0
GOOD = NodeReport(node="n0", gpus=8, gpu_memory_gib=79.6, free_gib=500.0, clock_s=CLOCK, versions={"torch": "2.13.0"})


def judge(changes: dict[str, dict[str, object] | None], *, late: dict[str, float] | None = None) -> dict[str, list[str]]:
    """Four good nodes, the named ones changed; None: silent."""
    nodes = ["n0", "n1", "n2", "n3"]
    reports: dict[str, NodeReport | None] = {node: replace(GOOD, node=node) for node in nodes}
    for node, change in changes.items():
        reports[node] = None if change is None else replace(GOOD, node=node, **change)  # type: ignore[arg-type]
    arrival = {node: CLOCK + (late or {}).get(node, 0.0) for node, report in reports.items() if report is not None}
    return problems(reports, gpus_per_node=8, arrival_s=arrival, roles={"n0": "trainer", "n1": "trainer", "n2": "server", "n3": "server"})


def test_nothing_is_wrong_with_equal_nodes() -> None:
    assert judge({}) == {}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (None, "sent no report"),
        ({"gpus": 7}, "7 GPUs, expected 8"),
        ({"free_gib": 0.25}, "0.25 GiB free"),
        ({"clock_s": CLOCK + 60}, "clock is +60 s"),
        ({"versions": {"torch": "2.12.0"}}, "torch 2.12.0, another node has 2.13.0"),
        ({"missing": ("model.path: models/m does not exist",)}, "model.path: models/m does not exist"),
    ],
)
def test_the_one_bad_node_is_named_with_its_reason(change: dict[str, object] | None, words: str) -> None:
    found = judge({"n3": change})
    assert "n3" in found and any(words in line for line in found["n3"])
    assert set(found) <= {"n3", "n2"}  # of two servers with two versions nobody knows which is right
    assert ("n2" in found) == (change is not None and "versions" in change)


def test_a_report_that_took_long_on_the_way_is_not_a_clock_that_is_off() -> None:
    assert judge({}, late={"n1": 2.0, "n2": 3.0}) == {}


def test_trainers_and_servers_may_have_different_packages() -> None:
    assert judge({node: {"versions": {"torch": "2.14.1", "sglang": "0.5.23"}} for node in ("n2", "n3")}) == {}


def test_a_report_survives_the_way_through_json() -> None:
    report = replace(GOOD, missing=("a", "b"))
    assert NodeReport.from_json(report.to_json()) == report


def test_this_machine_describes_itself(tmp_path: Path) -> None:
    import torch

    config = load_config(REPOSITORY / "configs/tiny_moe_cpu.yaml", [f"output_dir={tmp_path}", f"model.path={tmp_path / 'model'}"])
    config.run_dir.mkdir()
    report = describe_node(config, node="here", serves=False, missing=missing_paths(config))
    assert (report.node, report.missing) == ("here", ())
    assert report.gpus == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert report.versions["torch"] == torch.__version__ and "sglang" not in report.versions
    assert report.free_gib > 0


def test_missing_files_are_named_by_their_key(tmp_path: Path) -> None:
    config = load_config(
        REPOSITORY / "configs/qwen3_30b_a3b.yaml",
        [f"output_dir={tmp_path}", f"model.path={tmp_path}", f"prompts.source={tmp_path / 'p.parquet'}", "rollout.api_key_path=key"],
    )
    assert [line.split(":")[0] for line in missing_paths(config)] == ["prompts.source", "evaluation.prompts.source", "rollout.api_key_path"]
