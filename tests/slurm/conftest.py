"""A real Slurm on this machine, and the small base model that its jobs train."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from checkpoints_convert.atomic_files import write_atomically
from megatron_minpro.config import dump_config, load_config
from megatron_minpro.run import base_model, launcher
from megatron_minpro.run.run_folder import INITIAL_MODEL_FOLDER
from megatron_minpro.tracking.run_files import CONFIG_FILE
from tests.end_to_end.conftest import metrics_of
from tests.slurm.cluster import Job, SlurmCluster, missing_requirement

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "slurm/qwen3_30b_a3b.sbatch"
# The main job, shortened: 12 global steps that sample and 2 that train what waits.
GLOBAL_STEPS = 12
SETTINGS = (f"num_global_steps={GLOBAL_STEPS}", "evaluation.num_prompts=8", "checkpoint.every=2")
RESPONSES = GLOBAL_STEPS * 32 * 8


def need_slurm() -> None:
    """Skip where no cluster can be started; in CI that is a failure."""
    reason = missing_requirement()
    if reason is None:
        return
    if os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(f"Slurm: {reason}")
    pytest.skip(f"Slurm: {reason} (Debian: slurmctld slurmd slurm-client munge iproute2)")


@contextmanager
def started_cluster(*, num_nodes: int, gpus_per_node: int, namespaces: bool) -> Iterator[SlurmCluster]:
    """A cluster in a folder of a short name (the munge socket lies in it); skips where none can be started, fails in CI."""
    need_slurm()
    folder = Path(tempfile.mkdtemp(prefix="mp_slurm_"))
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a test run that is told to end takes the cluster down first
    try:
        with SlurmCluster(folder, num_nodes=num_nodes, gpus_per_node=gpus_per_node, namespaces=namespaces) as cluster:
            yield cluster
    finally:
        signal.signal(signal.SIGTERM, former)
        shutil.rmtree(folder)


@dataclass(frozen=True, slots=True)
class Disk:
    """A file system in memory, of its own."""

    folder: Path
    size: int = 1500 << 20  # the preflight wants a GiB

    def mount(self) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={self.size}", "tmpfs", self.folder], check=True)

    def unmount(self) -> None:
        subprocess.run(["umount", "--lazy", self.folder], check=True)

    @contextmanager
    def almost_full(self, *, free: int) -> Iterator[None]:
        """Inside the block no more than `free` bytes are free, on all nodes."""
        self._resize(shutil.disk_usage(self.folder).used + free)
        try:
            yield
        finally:
            self._resize(self.size)

    def _resize(self, size: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", self.folder], check=True)


@pytest.fixture(scope="session")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    """Mounted before the cluster starts: each of its nodes has a view of its own of what is mounted."""
    need_slurm()
    made = Disk(tmp_path_factory.mktemp("slurm_disk"))
    made.mount()
    yield made
    made.unmount()


@pytest.fixture(scope="session")
def cluster(disk: Disk) -> Iterator[SlurmCluster]:
    """Four nodes of two (fake) GPUs each, with networks of their own."""
    with started_cluster(num_nodes=4, gpus_per_node=2, namespaces=True) as running:
        yield running


@pytest.fixture(scope="session")
def small_base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `minpro train` makes before it trains: supervised learning on noisy worked examples."""
    folder = tmp_path_factory.mktemp("slurm_base")
    config = load_config(
        ROOT / "configs/tiny_moe_cpu.yaml",
        # One rank: two would spend half of their time in talking to each other. Half the batch: rewards still grow by 0.2 in 12 steps.
        [
            *(f"output_dir={folder}", "name=warm_up", f"model.path={folder / 'model'}", "world_size=1", "parallel.ep=1"),
            "model.warm_up.batch_size=32",
        ],
    )
    config.run_dir.mkdir()
    write_atomically(config.run_dir / CONFIG_FILE, dump_config(config))
    base_model.write_initial_model(config.model, config.prompts, config.run_dir / INITIAL_MODEL_FOLDER)
    ranks = launcher.start_workers(config, "warm_up")
    try:
        assert ranks.wait(900) == 0, ranks.describe_end()
    finally:
        ranks.terminate()
    return folder / "model"


@dataclass(frozen=True, slots=True, kw_only=True)
class Jobs:
    """Submits the production script with the tiny configuration: two nodes train (one rank each), two serve (one server each)."""

    cluster: SlurmCluster
    folder: Path
    disk: Disk
    base_model: Path
    numbers: dict[str, int] = field(default_factory=dict)  # of the jobs submitted, by name

    def submit(self, name: str, *settings: str, options: tuple[str, ...] = (), **environment: str) -> int:
        """environment: the script's variables that are not as the tests usually have them."""
        usual = {"CONFIG": "configs/tiny_moe_cpu.yaml", "RUN_DIR": str(self.run_dir(name))}
        usual |= {"GPUS_PER_NODE": "1", "SERVERS_PER_NODE": "1", "GPUS_SEEN": "0"}
        self.numbers[name] = self.cluster.submit(
            "--gpus-per-node=2",
            f"--output={self.folder}/{name}.out",
            *options,
            SCRIPT,
            *SETTINGS,
            f"model.path={self.base_model}",
            "model.warm_up=null",
            *settings,
            cwd=ROOT,
            environment={"OMP_NUM_THREADS": "1", **usual, **environment},
        )
        return self.numbers[name]

    def run_dir(self, name: str) -> Path:
        """Of the disturbed job: on a disk that can be full."""
        return (self.disk.folder if name == "disturbed" else self.folder) / name

    def metrics(self, name: str) -> list[dict[str, Any]]:
        return metrics_of(self.run_dir(name))

    def output(self, name: str) -> str:
        path = self.folder / f"{name}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def processes_on(self, index: int, words: str) -> list[psutil.Process]:
        """Those on one node whose command line holds `words`."""
        found = []
        for pid in self.cluster.pids_on(index):
            with suppress(psutil.NoSuchProcess):  # it has ended meanwhile
                process = psutil.Process(pid)
                if words in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def kill_ranks(self, index: int) -> bool:
        """Those of one node, with their torchrun. False where there is none yet."""
        found = [process for process in self.processes_on(index, "-m megatron_minpro.run.rank") if process.name() not in ("bash", "srun")]
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        return bool(found)

    def wait_for_steps(self, name: str, job_id: int, steps: int) -> None:
        """Until the run has that many global steps behind it. Fails when the job ends first."""

        def reached() -> bool:
            job = self.cluster.job(job_id)
            assert not job.ended, f"{job.state}\n{self.output(name)}"
            return len(self.metrics(name)) >= steps

        self.cluster.until(reached, f"{steps} global steps of {name}", timeout_s=900)

    def finish(self, name: str, job_id: int) -> Job:
        """Wait for the end; the job must have completed."""
        job = self.cluster.wait(job_id, timeout_s=1200)
        assert (job.state, job.exit_code) == ("COMPLETED", 0), self.output(name)
        return job


@pytest.fixture(scope="session")
def jobs(cluster: SlurmCluster, disk: Disk, small_base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """The way to submit jobs."""
    return Jobs(cluster=cluster, folder=tmp_path_factory.mktemp("slurm_jobs"), disk=disk, base_model=small_base_model)


@pytest.fixture(scope="session")
def undisturbed(jobs: Jobs) -> list[dict[str, Any]]:
    """Metrics of a run that nothing happens to."""
    jobs.finish("undisturbed", jobs.submit("undisturbed"))
    return jobs.metrics("undisturbed")
