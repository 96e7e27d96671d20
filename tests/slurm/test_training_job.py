"""slurm/qwen3_30b_a3b.sbatch on a real Slurm of four nodes: it trains, and what happens to it changes no number."""

from __future__ import annotations

import json
import os
import re
import stat
from typing import Any

import pytest

from tests.end_to_end.conftest import without_times
from tests.slurm.cluster import SlurmCluster
from tests.slurm.conftest import RESPONSES, Jobs

pytestmark = [pytest.mark.servers, pytest.mark.ranks, pytest.mark.timeout(2400)]


def test_it_trains_on_four_nodes(jobs: Jobs, undisturbed: list[dict[str, Any]]) -> None:
    run_dir = jobs.run_dir("undisturbed")
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["global_steps"] == 16 and len(undisturbed) == 18
    assert summary["reward_last"] > summary["reward_first"] + 0.05
    assert summary["rollouts_sampled"] == summary["rollouts_trained"] == RESPONSES
    assert (run_dir / "checkpoints/latest").read_text() == "step_000018"
    assert list((run_dir / "tensorboard").iterdir()) and list((run_dir / "plots").glob("*.png"))
    steps = {"preflight": "0123", "serve": "23", "train": "01"}  # which nodes did what, with a log each
    expected = {f"{step}-0-n{node}.log" for step, nodes in steps.items() for node in nodes}
    assert expected <= {path.name for path in (run_dir / "logs").iterdir()}
    for key in ("api", "admin"):
        assert stat.S_IMODE(os.stat(run_dir / "keys" / key).st_mode) == 0o600
        assert (run_dir / "keys" / key).read_text() not in "".join(path.read_text() for path in (run_dir / "logs").iterdir())
    preflight = json.loads((run_dir / "preflight.json").read_text())
    assert preflight["problems"] == {} and set(preflight["nodes"]) == {"n0", "n1", "n2", "n3"}
    assert all(len(jobs.cluster.pids_on(index)) == 1 for index in range(4))  # Slurm's own daemon alone: no process of the job is left


def test_the_time_limit_makes_it_save_requeue_and_continue_exactly(jobs: Jobs, undisturbed: list[dict[str, Any]]) -> None:
    job_id = jobs.submit("limited")
    jobs.wait_for_steps("limited", job_id, 3)
    minutes = int(jobs.cluster.job(job_id).fields["RunTime"].split(":")[1])
    # The limit comes near: less than --signal's half hour is left, so Slurm sends USR1 when it next looks, within half a minute. The
    # ranks stand still meanwhile: on a fast machine the run would be over by then.
    ranks = [process for index in (0, 1) for process in jobs.processes_on(index, "megatron_minpro.run.rank")]
    for rank in ranks:
        rank.suspend()
    jobs.cluster.run("scontrol", "update", f"JobId={job_id}", f"TimeLimit={minutes + 2}")
    jobs.cluster.until(lambda: "USR1: time is nearly up" in jobs.output("limited"), "USR1", timeout_s=360)
    for rank in ranks:
        rank.resume()
    jobs.cluster.until(lambda: jobs.cluster.job(job_id).restarts == 1, "the requeue", timeout_s=360)
    jobs.cluster.run("scontrol", "update", f"JobId={job_id}", "TimeLimit=1-0")  # the next attempt has a day again
    output = jobs.output("limited")
    assert "stopped with a checkpoint; requeued" in output
    saved = int((jobs.run_dir("limited") / "checkpoints/latest").read_text().removeprefix("step_"))
    assert saved == len(jobs.metrics("limited"))  # nothing was done after the checkpoint
    jobs.finish("limited", job_id)
    assert without_times(jobs.metrics("limited")) == without_times(undisturbed)
    assert json.loads((jobs.run_dir("limited") / "summary.json").read_text())["rollouts_lost"] == 0
    assert (jobs.run_dir("limited") / "logs/train-0-n0.log").exists() and (jobs.run_dir("limited") / "logs/train-1-n0.log").exists()


def test_a_trainer_node_that_dies_in_mid_step_costs_no_number(jobs: Jobs, undisturbed: list[dict[str, Any]]) -> None:
    job_id = jobs.submit("node_down")
    jobs.wait_for_steps("node_down", job_id, 3)
    jobs.cluster.set_node_down(1)
    jobs.cluster.until(lambda: jobs.cluster.job(job_id).restarts == 1, "the requeue", timeout_s=360)
    jobs.cluster.bring_node_back(1)
    jobs.finish("node_down", job_id)
    sampled = ("total/rollouts_sampled",)  # counts what the lost steps had sampled as well
    assert without_times(jobs.metrics("node_down"), but=sampled) == without_times(undisturbed, but=sampled)
    summary = json.loads((jobs.run_dir("node_down") / "summary.json").read_text())
    assert summary["rollouts_trained"] == RESPONSES
    assert summary["rollouts_sampled"] == summary["rollouts_trained"] + summary["rollouts_lost"]


def test_a_killed_server_is_started_again_on_its_node_and_costs_no_number(jobs: Jobs, undisturbed: list[dict[str, Any]]) -> None:
    job_id = jobs.submit("server_killed")
    jobs.wait_for_steps("server_killed", job_id, 3)
    min(jobs.processes_on(3, "rollout.sglang.cpu"), key=lambda process: process.create_time()).kill()
    assert jobs.finish("server_killed", job_id).restarts == 0
    assert without_times(jobs.metrics("server_killed")) == without_times(undisturbed)


def test_an_urgent_job_preempts_it_and_it_continues_to_the_same_numbers(jobs: Jobs, undisturbed: list[dict[str, Any]]) -> None:
    job_id = jobs.submit("preempted")
    jobs.wait_for_steps("preempted", job_id, 3)
    urgent = jobs.cluster.submit(
        "--partition=urgent", "--nodes=4", "--exclusive", f"--output={jobs.folder}/urgent.out", "--wrap=hostname", cwd=jobs.folder
    )
    assert jobs.cluster.wait(urgent, timeout_s=360).state == "COMPLETED"
    jobs.finish("preempted", job_id)
    assert jobs.cluster.job(job_id).restarts == 1
    assert "USR1: time is nearly up" in jobs.output("preempted")
    assert without_times(jobs.metrics("preempted")) == without_times(undisturbed)


def test_it_is_requeued_only_so_often(jobs: Jobs, undisturbed: list[dict[str, Any]]) -> None:
    job_id = jobs.submit("capped", MAX_REQUEUES="0")
    jobs.wait_for_steps("capped", job_id, 1)
    jobs.cluster.run("scancel", "--batch", "--signal=USR1", str(job_id))
    job = jobs.cluster.wait(job_id, timeout_s=360)
    assert (job.state, job.exit_code, job.restarts) == ("FAILED", 1, 0)
    assert "stopped with a checkpoint; not requeued: that was done 0 times (MAX_REQUEUES)" in jobs.output("capped")


@pytest.mark.parametrize(
    ("name", "settings", "environment", "words"),
    [
        ("no_config", (), {"CONFIG": "configs/absent.yaml"}, "CONFIG=configs/absent.yaml does not exist"),
        ("no_server_node", (), {"TRAINER_NODES": "4"}, "4 nodes, of which TRAINER_NODES=4 train: none is left to serve rollouts"),
        ("bad_key", ("sed=1",), {}, "unknown key sed; did you mean seed?"),
        ("bad_layout", ("parallel.ep=3",), {}, "parallel"),
        ("undisturbed", ("seed=7",), {}, "seed: 0 there, 7 here"),
        ("no_gpus", (), {"GPUS_SEEN": "2"}, "--exclude=n0,n1,n2,n3"),
        ("no_model", ("model.path=absent", "model.warm_up=null"), {}, "/absent does not exist and model.warm_up is null"),
    ],
)
def test_a_job_that_cannot_work_ends_at_once_and_says_why(
    name: str,
    settings: tuple[str, ...],
    environment: dict[str, str],
    words: str,
    jobs: Jobs,
    undisturbed: list[dict[str, Any]],
) -> None:
    output = f"--output={jobs.folder}/refused_{name}.out"
    job = jobs.cluster.wait(jobs.submit(name, *settings, options=(output,), **environment), timeout_s=360)
    said = (jobs.folder / f"refused_{name}.out").read_text()
    assert (job.state, job.restarts) == ("FAILED", 0)
    assert words in said and "Traceback" not in said
    assert "training" not in re.sub(r"trainers|refused_\S+", "", said)  # nothing was started


def test_a_dead_node_is_named_by_the_others(jobs: Jobs, cluster: SlurmCluster) -> None:
    """One of three nodes never runs the check: the first names it, and the second is told."""
    from megatron_minpro.cluster.nodes import read_reports

    config = jobs.folder / "undisturbed/config.yaml"
    command = f".venv/bin/minpro doctor {config} --peers n0,n1,n2 --trainers 2 --gpus 0 --port 23456 --timeout-s 12"
    done = cluster.client("srun", "--nodes=2", "--nodelist=n0,n1", "--kill-on-bad-exit=0", "bash", "-c", command)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("minpro: error: ")]
    assert len(lines) == 2
    assert all("n2: sent no report" in line and line.endswith("Submit again with --exclude=n2, or repair") for line in lines)
    reports = read_reports(jobs.folder / "undisturbed/preflight.json")
    assert reports["n2"] is None and reports["n1"] is not None
