"""The job scripts as they are shipped, on a cluster of 64 nodes that only answers questions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import SlurmCluster
from tests.slurm.conftest import ROOT, started_cluster

SCRIPTS = sorted(path.relative_to(ROOT) for path in (ROOT / "slurm").glob("*.sbatch"))


@pytest.fixture(scope="module")
def large_cluster() -> Iterator[SlurmCluster]:
    """64 nodes of 8 GPUs."""
    with started_cluster(num_nodes=64, gpus_per_node=8, namespaces=False) as running:
        yield running


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_slurm_would_run_it(script: Path, large_cluster: SlurmCluster) -> None:
    answer = large_cluster.client("sbatch", "--test-only", str(script), cwd=ROOT)
    assert answer.returncode == 0 and "to start at" in answer.stderr


def test_the_training_job_asks_for_whole_nodes_with_eight_gpus(large_cluster: SlurmCluster) -> None:
    job_id = large_cluster.submit("--hold", "slurm/qwen3_30b_a3b.sbatch", cwd=ROOT)
    fields = large_cluster.job(job_id).fields
    assert (fields["NumNodes"], fields["TresPerNode"], fields["OverSubscribe"], fields["Requeue"]) == ("4-4", "gres:gpu:8", "NO", "1")
    larger = large_cluster.submit("--hold", "--nodes=64", "slurm/qwen3_30b_a3b.sbatch", cwd=ROOT)
    assert large_cluster.job(larger).fields["NumNodes"] == "64-64"


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_every_option_stands_above_the_first_command(script: Path) -> None:
    """Slurm ignores later ones without a word."""
    lines = (ROOT / script).read_text().splitlines()
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert not [line for line in lines[first_command:] if line.startswith("#SBATCH")]
