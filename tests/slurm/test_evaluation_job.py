"""slurm/convert_and_evaluate.sbatch after a training job."""

from __future__ import annotations

import json
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.slurm.conftest import ROOT, Jobs

FINAL_STEP = "megatron_minpro.tasks.arithmetic_chains.reward:final_step"

pytestmark = [pytest.mark.servers, pytest.mark.timeout(2400)]
ROWS = [{"question": "1 + 2 * 3 - 4 + 5 * 6 - 7 :", "answer": "3"}, {"question": "2 + 2 + 2 + 2 + 2 + 2 + 2 :", "answer": "4"}]


def submit(jobs: Jobs, name: str, *arguments: str, dependency: str, **environment: str) -> int:
    return jobs.cluster.submit(
        "--gpus-per-node=2",
        f"--dependency={dependency}",
        "--kill-on-invalid-dep=yes",
        f"--output={jobs.folder}/{name}.out",
        "slurm/convert_and_evaluate.sbatch",
        *arguments,
        cwd=ROOT,
        environment={"OMP_NUM_THREADS": "1", "SERVERS": "1", "SERVER_TP": "1", **environment},
    )


def test_it_follows_the_training_job_and_prints_the_table(jobs: Jobs, undisturbed: list[dict[str, Any]]) -> None:
    questions = jobs.folder / "chains.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    arguments = (
        "--benchmarks",
        str(questions),
        "--style",
        "bare",
        "--grader",
        FINAL_STEP,
        "--samples",
        "2",
        "--max-new-tokens",
        "56",
    )
    run_dir = jobs.run_dir("undisturbed")
    job_id = submit(jobs, "evaluated", *arguments, dependency=f"afterok:{jobs.numbers['undisturbed']}", RUN_DIR=str(run_dir))
    job = jobs.cluster.wait(job_id, timeout_s=900)
    assert job.state == "COMPLETED", jobs.output("evaluated")
    assert "| chains" in jobs.output("evaluated")
    converted, exported = (load_file(run_dir / folder / "model.safetensors") for folder in ("policy_from_checkpoint", "policy"))
    assert converted.keys() == exported.keys()
    assert all((converted[name] == exported[name]).all() for name in exported)
    responses = [path.read_text().splitlines() for path in (run_dir / "evaluation/responses").glob("*.jsonl")]
    assert sum(map(len, responses)) == len(ROWS) * 2


def test_without_a_checkpoint_it_ends_at_once(jobs: Jobs) -> None:
    job_id = submit(jobs, "nothing_to_evaluate", dependency="singleton", RUN_DIR=str(jobs.folder / "absent"))
    assert jobs.cluster.wait(job_id, timeout_s=360).state == "FAILED"
    assert "error: RUN_DIR=" in jobs.output("nothing_to_evaluate") and "holds no checkpoints" in jobs.output("nothing_to_evaluate")
