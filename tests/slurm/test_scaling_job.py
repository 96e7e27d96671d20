"""slurm/ep_scaling.sbatch: an array of three layouts on the fake cluster, then the report as an afterok job."""

from __future__ import annotations

import json

import pytest

from tests.slurm.conftest import ROOT, Jobs

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(2400)]
STUDY = ("--ep", "1,2,3", "--scaling", "strong", "--steps", "2", "--warm-up", "1")


def submit(jobs: Jobs, *options: str, **environment: str) -> int:
    return jobs.cluster.submit(
        "--nodes=2",
        "--gpus-per-node=2",
        f"--output={jobs.folder}/scaling-%a.out",
        *options,
        "slurm/ep_scaling.sbatch",
        *STUDY,
        f"model.path={jobs.base_model}",
        cwd=ROOT,
        environment={
            "OMP_NUM_THREADS": "1",
            "CONFIG": "configs/tiny_moe_cpu.yaml",
            "OUT": str(jobs.folder / "scaling"),
            "HARDWARE": "cpu",
            **environment,
        },
    )


def test_an_array_measures_one_layout_per_task_and_a_job_after_it_reports(jobs: Jobs) -> None:
    """ep 1 runs on one node, ep 2 over two nodes, ep 3 is illegal for 8 experts: three rows, no failed job."""
    array = submit(jobs, "--array=0-2")
    report = submit(
        jobs, "--array=0", f"--dependency=afterok:{array}", "--kill-on-invalid-dep=yes", f"--output={jobs.folder}/report.out", REPORT="1"
    )
    job = jobs.cluster.wait(report, timeout_s=1200)
    said = {name: (jobs.folder / f"{name}.out").read_text() for name in ("scaling-0", "scaling-1", "scaling-2")}
    assert job.state == "COMPLETED", said
    rows = [json.loads(line) for line in (jobs.folder / "scaling/rows.jsonl").read_text().splitlines()]
    measured = {row["ep"]: row for row in rows if row["kind"] == "measured"}
    assert {ep: row["status"] for ep, row in measured.items()} == {1: "ok", 2: "ok", 3: "illegal"}
    assert measured[2]["exposed_s"]["dispatch"] > 0
    assert "s a step" in said["scaling-0"] and "s a step" in said["scaling-1"]
    assert "illegal: parallel: ep=3 does not divide 8 experts" in said["scaling-2"]
    logs = {path.name for path in (jobs.folder / "scaling/logs").iterdir()}
    assert {"ranks1_ep1_sequences16.log", "ranks2_ep2_sequences16_node0.log", "ranks2_ep2_sequences16_node1.log"} <= logs
    assert "| strong  | 2     | 2" in (jobs.folder / "report.out").read_text()
