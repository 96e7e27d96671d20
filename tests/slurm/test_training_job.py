"""slurm/qwen3_30b_a3b.sbatch on a real Slurm of four nodes: it trains, and what happens to it changes no number."""

from __future__ import annotations

import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import psutil
import pytest
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_minpro.cluster.nodes.check import read_reports
from megatron_minpro.cluster.nodes.needs import needs_of
from megatron_minpro.config import load_config
from megatron_minpro.run.attempts import Place
from megatron_minpro.run.run_folder import ATTEMPTS_FILE, LOST_FILE
from megatron_minpro.tracking.progress import Progress, read_progress
from tests.end_to_end.conftest import without_times
from tests.slurm.cluster import SlurmCluster
from tests.slurm.conftest import GLOBAL_STEPS, RESPONSES, ROOT, Jobs

pytestmark = [pytest.mark.servers, pytest.mark.ranks, pytest.mark.timeout(2400)]

Found = TypeVar("Found")


def test_it_trains_on_four_nodes(jobs: Jobs, undisturbed: list[dict[str, Any]]) -> None:
    run_dir = jobs.run_dir("undisturbed")
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["global_steps"] == GLOBAL_STEPS and len(undisturbed) == GLOBAL_STEPS + 2
    assert summary["reward_last"] > summary["reward_first"] + 0.05
    assert summary["rollouts_sampled"] == summary["rollouts_trained"] == RESPONSES
    assert (run_dir / "checkpoints/latest").read_text() == f"step_{GLOBAL_STEPS + 2:06d}"
    assert list((run_dir / "tensorboard").iterdir()) and list((run_dir / "plots").glob("*.png"))
    steps = {"preflight": "0123", "serve": "23", "train": "01"}  # which nodes did what, with a log each
    expected = {f"{step}-0-n{node}.log" for step, nodes in steps.items() for node in nodes}
    assert expected <= {path.name for path in (run_dir / "logs").iterdir()}
    for key in ("api", "admin"):
        assert stat.S_IMODE(os.stat(run_dir / "keys" / key).st_mode) == 0o600
        assert (run_dir / "keys" / key).read_text() not in "".join(path.read_text() for path in (run_dir / "logs").iterdir())
    preflight = json.loads((run_dir / "preflight.json").read_text())
    assert preflight["problems"] == {} and set(preflight["nodes"]) == {"n0", "n1", "n2", "n3"}
    for index, (name, node) in enumerate(preflight["nodes"].items()):  # Debian's /etc/hosts: a loopback address for one's own name
        assert node["means"][name] == "127.0.1.1" and node["address"] == f"10.77.1.{index + 1}"
        assert node["variables"]["GLOO_SOCKET_IFNAME"] == node["interface"] == "eth0"
    assert "names that mean a loopback address on their own node, which is not used: n0, n1, n2, n3" in jobs.output("undisturbed")
    assert all(len(jobs.cluster.pids_on(index)) == 1 for index in range(4))  # Slurm's own daemon alone: no process of the job is left


@dataclass(frozen=True, slots=True, kw_only=True)
class Disturbed:
    """What was seen of one job.

    One of its servers hung, its disk was full, it lost a rank and a serving node, came near its time limit, made way for another job and
    lost a node.
    """

    said_by_the_servers: str
    said_by_the_ranks: str
    saved_before_the_failure: int
    restarts_before_the_failure: int
    said_at_the_failure: str
    restarts_before_the_limit: int
    lost_before_the_limit: int
    said_at_the_limit: str
    steps_at_the_limit: int
    updating_at_the_limit: int
    saved_at_the_limit: str
    urgent_state: str
    said_while_urgent: str
    sampling_while_urgent: int
    saved_while_urgent: str
    restarts_before_the_death: int
    lost_before_the_death: int
    restarts: int
    metrics: list[dict[str, Any]]
    summary: dict[str, Any]
    logs: set[str]


# Of a hang: a step of sampling or of a weight update takes a tenth of a second here.
TIME_LIMITS = ("rollout.weight_sync_timeout_s=8", "rollout.progress_timeout_s=12")
ONE_SERVER, TWO_SERVERS = (1, 1), (2, 0)  # those that gave responses, those that gave no answer


def fared(metrics: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """The servers, batch by batch."""
    return [(row["servers/used"], row["servers/silent"]) for row in metrics if "servers/used" in row]


@contextmanager
def standing_still(jobs: Jobs) -> Iterator[None]:
    """The ranks do not go on inside the block: on a fast machine the run would be over before Slurm does what is waited for."""
    ranks = [process for index in (0, 1) for process in jobs.processes_on(index, "megatron_minpro.run.rank")]
    for rank in ranks:
        rank.suspend()
    yield
    for rank in ranks:
        with suppress(psutil.NoSuchProcess):  # its node has died meanwhile
            rank.resume()


def global_step(checkpoint: str) -> int:
    """step_000007_update_0003: 7."""
    return int(checkpoint.removeprefix("step_").partition("_")[0])


@contextmanager
def standing_still_when(jobs: Jobs, condition: Callable[[], Found], what: str) -> Iterator[Found]:
    """As standing_still, at a moment at which the condition is true. Gives what it found."""
    deadline = time.monotonic() + 360
    while True:
        assert time.monotonic() < deadline, f"never {what}"
        if condition():
            with standing_still(jobs):
                if found := condition():  # still, now that nothing goes on
                    yield found
                    return
        time.sleep(0.01)


@contextmanager
def without_answers(jobs: Jobs, name: str) -> Iterator[None]:
    """The trainer waits for a batch, and the servers stand still: no response arrives inside the block."""
    done = False
    while not done:
        jobs.cluster.until(lambda: progress(jobs, name).beside == "sample", "sampling", timeout_s=360)
        servers = [process for index in (2, 3) for process in jobs.processes_on(index, "rollout.sglang.cpu")]
        for server in servers:
            server.suspend()
        # If the batch was complete already, the trainer goes on to the weight sync.
        jobs.cluster.until(lambda: progress(jobs, name).phase in ("wait", "sync"), "the end of an update", timeout_s=360)
        time.sleep(0.5)
        if done := progress(jobs, name).phase == "wait":
            yield
        for server in servers:
            with suppress(psutil.NoSuchProcess):
                server.resume()


def progress(jobs: Jobs, name: str) -> Progress:
    """What goes on in the job."""
    found = read_progress(jobs.run_dir(name))
    assert found is not None
    return found


@pytest.fixture(scope="module")
def disturbed(jobs: Jobs, undisturbed: list[dict[str, Any]]) -> Disturbed:
    """One job for all these tests: a job spends most of its time in starting."""
    name = "disturbed"
    cluster, run_dir, job_id = jobs.cluster, jobs.run_dir(name), jobs.submit(name, *TIME_LIMITS)

    def saved() -> str:
        return (run_dir / "checkpoints/latest").read_text()

    def said(log: str) -> str:
        return (run_dir / "logs" / log).read_text()

    jobs.wait_for_steps(name, job_id, 2)
    cluster.until(lambda: (run_dir / "checkpoints/latest").exists(), "a checkpoint", timeout_s=360)
    [scheduler] = jobs.processes_on(3, "sglang::scheduler")  # what computes; its HTTP process goes on
    scheduler.suspend()
    cluster.until(lambda: "restarting it" in said("serve-0-n3.log"), "the hang to be noticed", timeout_s=360)
    with jobs.disk.almost_full(free=1 << 20):  # half a checkpoint, and several steps of rollouts, token records and log lines
        cluster.until(lambda: "was not written" in said("train-0-n0.log"), "a checkpoint that finds no room", timeout_s=360)
    with standing_still(jobs):
        cluster.until(lambda: "runs again" in said("serve-0-n3.log"), "a new server", timeout_s=360)
    jobs.wait_for_steps(name, job_id, 4)
    with standing_still(jobs):
        said_by_the_servers, said_by_the_ranks = said("serve-0-n3.log"), said("train-0-n0.log")
        restarts_before_the_failure, saved_before_the_failure = cluster.job(job_id).restarts, global_step(saved())
        jobs.kill_ranks(1)
    cluster.until(lambda: cluster.job(job_id).restarts == restarts_before_the_failure + 1, "the requeue", timeout_s=360)
    said_at_the_failure = jobs.output(name)
    jobs.wait_for_steps(name, job_id, 5)
    [serve] = jobs.processes_on(3, "minpro serve")
    serve.kill()
    cluster.until(lambda: ONE_SERVER in fared(jobs.metrics(name)), "a batch by one of two servers", timeout_s=360)
    jobs.wait_for_steps(name, job_id, 6)
    restarts_before_the_limit, lost_before_the_limit = cluster.job(job_id).restarts, int((run_dir / LOST_FILE).read_text())

    minutes = int(cluster.job(job_id).fields["RunTime"].split(":")[1])
    # Less than --signal's half hour is left then: Slurm sends USR1 when it next looks, within half a minute.
    with standing_still_when(jobs, lambda: progress(jobs, name).phase == "update", "in an update"):
        updating_at_the_limit = len(jobs.metrics(name))
        cluster.run("scontrol", "update", f"JobId={job_id}", f"TimeLimit={minutes + 2}")
        cluster.until(lambda: "USR1: time is nearly up" in jobs.output(name), "USR1", timeout_s=360)
    cluster.until(lambda: cluster.job(job_id).restarts == restarts_before_the_limit + 1, "the requeue", timeout_s=360)
    cluster.run("scontrol", "update", f"JobId={job_id}", "TimeLimit=1-0")  # the next attempt has a day again
    said_at_the_limit, steps_at_the_limit, saved_at_the_limit = jobs.output(name), len(jobs.metrics(name)), saved()

    jobs.wait_for_steps(name, job_id, global_step(saved_at_the_limit) + 2)
    with without_answers(jobs, name):
        sampling_while_urgent = len(jobs.metrics(name))
        options = ("--partition=urgent", "--nodes=4", "--exclusive", f"--output={jobs.folder}/urgent.out", "--wrap=hostname")
        urgent = cluster.submit(*options, cwd=jobs.folder)
        cluster.until(lambda: "USR1: time is nearly up" in jobs.output(name)[len(said_at_the_limit) :], "USR1", timeout_s=360)
        cluster.until(lambda: "_update_" in saved() and global_step(saved()) == sampling_while_urgent, "the checkpoint", timeout_s=360)
        saved_while_urgent = saved()
    urgent_state = cluster.wait(urgent, timeout_s=360).state
    said_while_urgent = jobs.output(name)[len(said_at_the_limit) :]

    jobs.wait_for_steps(name, job_id, global_step(saved()) + 1)
    with standing_still(jobs):
        restarts_before_the_death = cluster.job(job_id).restarts
        lost_before_the_death = int((run_dir / LOST_FILE).read_text())
        cluster.set_node_down(1)
    cluster.until(lambda: cluster.job(job_id).restarts == restarts_before_the_death + 1, "the requeue", timeout_s=360)
    cluster.bring_node_back(1)
    return Disturbed(
        said_by_the_servers=said_by_the_servers,
        said_by_the_ranks=said_by_the_ranks,
        saved_before_the_failure=saved_before_the_failure,
        restarts_before_the_failure=restarts_before_the_failure,
        said_at_the_failure=said_at_the_failure,
        restarts_before_the_limit=restarts_before_the_limit,
        lost_before_the_limit=lost_before_the_limit,
        said_at_the_limit=said_at_the_limit,
        steps_at_the_limit=steps_at_the_limit,
        updating_at_the_limit=updating_at_the_limit,
        saved_at_the_limit=saved_at_the_limit,
        urgent_state=urgent_state,
        said_while_urgent=said_while_urgent,
        sampling_while_urgent=sampling_while_urgent,
        saved_while_urgent=saved_while_urgent,
        restarts_before_the_death=restarts_before_the_death,
        lost_before_the_death=lost_before_the_death,
        restarts=jobs.finish(name, job_id).restarts,
        metrics=jobs.metrics(name),
        summary=json.loads((run_dir / "summary.json").read_text()),
        logs={path.name for path in (run_dir / "logs").iterdir()},
    )


def assert_equal_but_for_the_lost(disturbed: Disturbed, undisturbed: list[dict[str, Any]]) -> None:
    """To the last digit; what was sampled and lost with the rank, and with the node, is counted in the lines since."""
    before = disturbed.saved_before_the_failure
    assert without_times(disturbed.metrics[:before]) == without_times(undisturbed[:before])
    sampled = ("total/rollouts_sampled",)
    assert without_times(disturbed.metrics, but=sampled) == without_times(undisturbed, but=sampled)


def test_a_server_that_hangs_is_started_again_and_costs_no_number(disturbed: Disturbed, undisturbed: list[dict[str, Any]]) -> None:
    assert re.search(r"its computing process has answered nothing for \d+ s: .*; restarting it", disturbed.said_by_the_servers)
    assert disturbed.restarts_before_the_failure == 0
    assert_equal_but_for_the_lost(disturbed, undisturbed)


def test_a_full_disk_costs_a_warning_and_no_number(jobs: Jobs, disturbed: Disturbed, undisturbed: list[dict[str, Any]]) -> None:
    refused = r"checkpoint step_\d+ was not written, (step_\d+) stays the newest: .*No space left on device.*; it needs about [\d,]+ bytes"
    room = rf"beside the 2 that are kept \(checkpoint.keep\), [\d,]+ are free on {jobs.disk.folder}; training goes on"
    found = re.search(f"{refused} {room}", disturbed.said_by_the_ranks)
    assert found is not None, disturbed.said_by_the_ranks
    # The next attempt began with the old state, or with one that was written since.
    assert global_step(found[1]) <= disturbed.saved_before_the_failure
    assert disturbed.restarts_before_the_failure == 0
    assert_equal_but_for_the_lost(disturbed, undisturbed)


def test_a_server_node_that_gives_up_ends_no_other(disturbed: Disturbed, undisturbed: list[dict[str, Any]]) -> None:
    assert re.search(r"the servers of n3 have ended, see \S*/logs/serve-1-n3.log; 1 of 2 nodes serve", disturbed.said_at_the_limit)
    assert ONE_SERVER in fared(disturbed.metrics) and fared(undisturbed) == [TWO_SERVERS] * GLOBAL_STEPS
    assert fared(disturbed.metrics)[-1] == TWO_SERVERS, "the next attempt had both nodes again"
    assert_equal_but_for_the_lost(disturbed, undisturbed)


def test_the_time_limit_makes_it_save_requeue_and_continue_exactly(disturbed: Disturbed, undisturbed: list[dict[str, Any]]) -> None:
    assert "USR1: time is nearly up" in disturbed.said_at_the_limit
    assert "stopped with a checkpoint; requeued" in disturbed.said_at_the_limit
    # The update that the signal met was not finished: the checkpoint is of the same global step.
    assert re.fullmatch(rf"step_{disturbed.updating_at_the_limit:06d}_update_\d{{4}}", disturbed.saved_at_the_limit)
    assert disturbed.updating_at_the_limit == disturbed.steps_at_the_limit >= 6  # nothing was done after the checkpoint
    assert_equal_but_for_the_lost(disturbed, undisturbed)
    assert disturbed.lost_before_the_death == disturbed.lost_before_the_limit
    assert {"train-1-n0.log", "train-2-n0.log"} <= disturbed.logs


def test_a_failure_after_a_checkpoint_requeues_it_and_costs_no_number(disturbed: Disturbed, undisturbed: list[dict[str, Any]]) -> None:
    assert disturbed.restarts_before_the_limit == 1
    [line] = [line for line in disturbed.said_at_the_failure.splitlines() if line.endswith("; requeued")]
    assert f"it came from {Place()} to step_{disturbed.saved_before_the_failure:06d} " in line
    assert_equal_but_for_the_lost(disturbed, undisturbed)


def test_an_urgent_job_preempts_it_and_it_continues_to_the_same_numbers(disturbed: Disturbed, undisturbed: list[dict[str, Any]]) -> None:
    assert disturbed.urgent_state == "COMPLETED"
    assert disturbed.restarts_before_the_death == disturbed.restarts_before_the_limit + 2  # the first for the time limit
    assert "USR1: time is nearly up" in disturbed.said_while_urgent
    # No server answered from the signal to the checkpoint: the stop did not wait for the batch.
    assert disturbed.saved_while_urgent == f"step_{disturbed.sampling_while_urgent:06d}_update_0016"
    assert_equal_but_for_the_lost(disturbed, undisturbed)
    assert disturbed.lost_before_the_death == disturbed.lost_before_the_limit


def test_a_trainer_node_that_dies_in_mid_step_costs_no_number(disturbed: Disturbed, undisturbed: list[dict[str, Any]]) -> None:
    assert disturbed.restarts == 4
    assert_equal_but_for_the_lost(disturbed, undisturbed)
    assert disturbed.summary["rollouts_trained"] == RESPONSES
    assert disturbed.summary["rollouts_sampled"] == RESPONSES + disturbed.summary["rollouts_lost"]


def test_a_second_failure_at_the_same_place_ends_the_job(jobs: Jobs, undisturbed: list[dict[str, Any]]) -> None:
    name = "hopeless"
    job_id = jobs.submit(name, options=("--nodes=2", "--nodelist=n0"), TRAINER_NODES="1", GPUS_PER_NODE="2")
    for start in (0, 1):
        jobs.cluster.until(lambda start=start: jobs.cluster.job(job_id).restarts == start and jobs.kill_ranks(0), "ranks", timeout_s=360)
    job = jobs.cluster.wait(job_id, timeout_s=360)
    assert (job.state, job.exit_code, job.restarts) == ("FAILED", 1, 1)
    failed = "training ended with exit code 137, see"
    first, second = [line for line in jobs.output(name).splitlines() if failed in line]
    assert first.endswith(f"; the first failure without a new checkpoint since {Place()}; requeued")
    assert second.endswith(f"; not requeued: the second failure without a new checkpoint since {Place()}")
    lines = [json.loads(line) for line in (jobs.run_dir(name) / ATTEMPTS_FILE).read_text().splitlines()]
    assert [(line["attempt"], line["event"]) for line in lines] == [(0, "began"), (0, "failed"), (1, "began"), (1, "failed")]
    assert [line["then"].split()[0] for line in lines[1::2]] == ["requeue", "stop"] and failed in lines[3]["reason"]


def test_a_stop_lets_a_save_end_and_is_requeued_only_so_often(jobs: Jobs, undisturbed: list[dict[str, Any]]) -> None:
    checkpoints = jobs.run_dir("capped") / "checkpoints"

    def being_written() -> str | None:
        found = [path.name for path in checkpoints.glob(".step_*.partial")]
        return found[0].removeprefix(".").removesuffix(".partial") if found else None

    # Two ranks on each of two nodes.
    job_id = jobs.submit("capped", "checkpoint.every=1", options=("--nodes=3",), GPUS_PER_NODE="2", MAX_REQUEUES="0")
    jobs.wait_for_steps("capped", job_id, 1)
    with standing_still_when(jobs, being_written, "saving") as name:
        jobs.cluster.run("scancel", "--batch", "--signal=USR1", str(job_id))
        jobs.cluster.until(lambda: "USR1: time is nearly up" in jobs.output("capped"), "USR1", timeout_s=360)
    job = jobs.cluster.wait(job_id, timeout_s=360)
    assert (job.state, job.exit_code, job.restarts) == ("FAILED", 1, 0)
    assert "stopped with a checkpoint; not requeued: that was done 0 times (MAX_REQUEUES)" in jobs.output("capped")
    latest = (checkpoints / "latest").read_text()
    assert (checkpoints / name / "run.json").is_file() and latest >= name and not list(checkpoints.glob(".step_*"))
    assert global_step(latest) <= global_step(name) + 1, "it was not trained on"


# What cannot work: settings, variables of the script, and what is said.
REFUSED: dict[str, tuple[tuple[str, ...], dict[str, str], str]] = {
    "no_config": ((), {"CONFIG": "configs/absent.yaml"}, "CONFIG=configs/absent.yaml does not exist"),
    "no_server_node": ((), {"TRAINER_NODES": "2"}, "2 nodes, of which TRAINER_NODES=2 train: none is left to serve rollouts"),
    "bad_key": (("sed=1",), {}, "unknown key sed; did you mean seed?"),
    "bad_layout": (("parallel.ep=3",), {}, "parallel"),
    "undisturbed": (("seed=7",), {}, "seed: 0 there, 7 here"),
    "no_model": (("model.path=absent",), {}, "/absent does not exist and model.warm_up is null"),
    "no_gpus": ((), {"GPUS_SEEN": "2"}, "Submit again with --exclude="),
}


@pytest.fixture(scope="module")
def refused(jobs: Jobs, undisturbed: list[dict[str, Any]]) -> dict[str, int]:
    """All of them, submitted at once. They take two nodes each, so two run at the same time."""

    def submit(name: str) -> int:
        settings, environment, _ = REFUSED[name]
        options = ("--nodes=2", f"--output={jobs.folder}/refused_{name}.out")
        return jobs.submit(name, *settings, options=options, **{"TRAINER_NODES": "1", "GPUS_PER_NODE": "2", **environment})

    return {name: submit(name) for name in REFUSED}


@pytest.mark.parametrize("name", REFUSED)
def test_a_job_that_cannot_work_ends_at_once_and_says_why(name: str, jobs: Jobs, refused: dict[str, int]) -> None:
    job = jobs.cluster.wait(refused[name], timeout_s=360)
    said = (jobs.folder / f"refused_{name}.out").read_text()
    assert (job.state, job.restarts) == ("FAILED", 0)
    assert REFUSED[name][2] in said and "Traceback" not in said
    if name == "no_gpus":
        assert re.search(r"0 GPUs, expected 2.*; n\d: .*0 GPUs, expected 2.*--exclude=n\d,n\d, or repair", said)
    assert "training" not in re.sub(r"trainers|refused_\S+", "", said)  # nothing was started


def test_a_checkpoint_has_the_size_that_the_preflight_wants_room_for(jobs: Jobs, undisturbed: list[dict[str, Any]]) -> None:
    run_dir = jobs.run_dir("undisturbed")
    tensors = FileSystemReader(run_dir / f"checkpoints/step_{GLOBAL_STEPS + 2:06d}/actor").read_metadata().state_dict_metadata.values()
    saved = sum(tensor.size.numel() * tensor.properties.dtype.itemsize for tensor in tensors if isinstance(tensor, TensorStorageMetadata))
    assert needs_of(load_config(run_dir / "config.yaml", []), trainers=2).checkpoint == saved


def test_a_dead_node_and_mixed_versions_are_named_by_the_others(jobs: Jobs, cluster: SlurmCluster) -> None:
    """One of four nodes never runs the check, another has an older package."""
    config, old = jobs.folder / "undisturbed/config.yaml", jobs.folder / "old/math_verify-0.0.1.dist-info"
    old.mkdir(parents=True)
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: math-verify\nVersion: 0.0.1\n")
    command = f".venv/bin/minpro doctor {config} world_size=4 --peers n0,n1,n2,n3 --trainers 4 --gpus 0 --port 23456 --timeout-s 60"
    command = f'[ "$SLURMD_NODENAME" != n1 ] || export PYTHONPATH={old.parent}:$PYTHONPATH; {command}'
    done = cluster.client("srun", "--nodes=3", "--nodelist=n0,n1,n2", "--kill-on-bad-exit=0", "bash", "-c", command, cwd=ROOT)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("minpro: error: ")]
    assert len(lines) == 3 and len(set(lines)) == 1, done.stderr
    assert "preflight: n1: math-verify 0.0.1, most nodes have " in lines[0] and "; n3: sent no report" in lines[0]
    assert lines[0].endswith("Submit again with --exclude=n1,n3, or repair")
    reports = read_reports(jobs.folder / "undisturbed/preflight.json")
    assert reports["n3"] is None and reports["n1"] is not None
