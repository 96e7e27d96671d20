"""The job scripts on a cluster whose nodes have no Python: everything of ours runs in the container that CONTAINER_IMAGE names.

srun and scontrol are stand-ins, there is no pyxis here; the scripts and lib.sh are the real ones. The programs of .venv refuse to run
outside of a container.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.conftest import ROOT

SRUN = """#!/usr/bin/env bash
PLACE=node nodes=(localhost)
while [[ $1 == --* ]]; do
  case "$1" in
    --container-image=/image.sqsh) PLACE=container ;;
    --nodelist=*) IFS=, read -ra nodes <<<"${1#*=}" ;;
    --output=*) output="${1#*=}" ;;
  esac
  shift
done
echo "${output:-no log} $PLACE" >>"$STEPS"
for node in "${nodes[@]}"; do
  if [[ -n ${output:-} ]]; then exec >"${output//%N/$node}" 2>&1; fi
  SLURMD_NODENAME="$node" SLURM_NODEID=0 SLURM_STEP_NUM_NODES=1 "$@" || exit
done
"""
SCONTROL = """#!/bin/sh
[ "$1" != show ] || exec printf 'localhost\\n127.0.0.2\\n'
echo "$@" >>"$STEPS.scontrol"
[ -n "$REQUEUES" ]
"""
MINPRO = """#!/usr/bin/env bash
[[ $PLACE == "$ALLOWED" ]] || { echo "$0 $1 runs in the $PLACE" >&2; exit 97; }
echo "minpro $*" >>"$STEPS.commands"
case "$1" in
  train) echo '{"job": "7", "attempt": 0, "event": "began", "checkpoint": "", "policy_version": 0}' >"$RUN_DIR/attempts.jsonl" ;;
  serve)
    mkdir -p "${@: -1}" && echo '[]' >"${@: -1}/endpoints.json"
    [[ -n ${SERVERS_END:-} ]] || exec sleep 600
    until [[ -e $RUN_DIR/endpoints.json ]]; do sleep 0.1; done ;;
  study)
    [[ -n ${TIME_IS_UP:-} ]] || exit "${STUDY_ENDS:-0}"
    kill -USR1 "$(cut -d ' ' -f 4 "/proc/$PPID/stat")"
    until [[ -e $6 ]]; do sleep 0.05; done
    exit 1 ;;
  evaluate) mkdir -p "$RUN_DIR/evaluation/tables" && touch "$RUN_DIR"/evaluation/tables/{scores,pass_at_k}.md ;;
esac
echo "minpro $1"
"""
TORCHRUN = """#!/usr/bin/env bash
[[ $PLACE == "$ALLOWED" ]] || exit 97
echo "torchrun $*" >>"$STEPS.commands"
[[ $* != *run.rank* ]] || until [[ -e $RUN_DIR/endpoints.json ]]; do sleep 0.1; done
[[ -z ${SERVERS_END:-} ]] || until [[ -e $RUN_DIR/stop ]]; do sleep 0.1; done
echo "{\\"complete\\": ${COMPLETE:-true}}" >"$RUN_DIR/result.json"
"""
PYTHON = f"""#!/usr/bin/env bash
[[ $PLACE == "$ALLOWED" ]] || {{ echo "Python runs in the $PLACE" >&2; exit 97; }}
exec {sys.executable} "$@"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The submit folder of a job on nodes without a Python."""
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "qwen3_30b_a3b.yaml").write_text("")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for name, text in {
        "bin/srun": SRUN,
        "bin/scontrol": SCONTROL,
        "bin/python": PYTHON,
        "bin/python3": PYTHON,
        ".venv/bin/minpro": MINPRO,
        ".venv/bin/torchrun": TORCHRUN,
        ".venv/bin/python": PYTHON,
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def run(folder: Path, script: str, *, unset: str = "", **environment: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """What the script said, and one line for each srun: its log file and whether it was in a container."""
    usual = {
        "PATH": f"{folder}/bin:/usr/bin:/bin",
        "HOME": str(folder),
        "PYTHONPATH": str(ROOT),
        "STEPS": str(folder / "steps"),
        "PLACE": "node",
        "ALLOWED": "container",
        "RUN_DIR": "run",
        "TRAINER_NODES": "1",
        "SERVERS_PER_NODE": "1",
        "SLURM_SUBMIT_DIR": str(folder),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n[0-1]",
        "SLURM_GPUS_ON_NODE": "2",
        "SLURM_ARRAY_TASK_ID": "0",
        "OUT": "run/evaluation" if script == "convert_and_evaluate" else "study",
    }
    done = subprocess.run(
        ["bash", f"slurm/{script}.sbatch"],
        cwd=folder,
        env={name: value for name, value in {**usual, **environment}.items() if name != unset},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return done, (folder / "steps").read_text().splitlines() if (folder / "steps").exists() else []


@pytest.mark.parametrize("script", ["qwen3_30b_a3b", "convert_and_evaluate", "ep_scaling", "study"])
def test_everything_of_ours_runs_in_the_container(folder: Path, script: str) -> None:
    done, steps = run(folder, script, CONTAINER_IMAGE="/image.sqsh")
    assert done.returncode == 0, done.stdout + done.stderr
    assert steps and {line.split()[-1] for line in steps} == {"container"}


def test_without_a_container_the_script_s_own_commands_cost_no_step(folder: Path) -> None:
    done, steps = run(folder, "qwen3_30b_a3b", ALLOWED="node")
    assert done.returncode == 0, done.stdout + done.stderr
    assert steps[:1] + sorted(steps[1:]) == [f"run/logs/{name}-0-%N.log node" for name in ("preflight", "serve", "train")]


def test_a_cell_of_a_study_stops_in_time_and_is_requeued(folder: Path) -> None:
    done, _ = run(folder, "study", ALLOWED="node", STUDY="mine.yaml", TIME_IS_UP="yes", REQUEUES="yes")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "steps.commands").read_text() == "minpro study mine.yaml --cell 0 --stop-file study/7_0/stop\n"
    assert (folder / "steps.scontrol").read_text() == "requeue 7\n"
    assert "stopped with a checkpoint; requeued" in done.stdout


def test_a_cell_of_a_study_that_fails_is_a_failed_task(folder: Path) -> None:
    done, _ = run(folder, "study", ALLOWED="node", STUDY_ENDS="1")
    assert (done.returncode, (folder / "steps.scontrol").exists()) == (1, False)
    assert "error: cell failed, see study/7_0/logs/cell-0-" in done.stderr


def test_a_command_of_ours_on_a_node_without_python_ends_the_job(folder: Path) -> None:
    done, steps = run(folder, "qwen3_30b_a3b")
    assert (done.returncode, steps) == (1, [])
    assert "minpro train runs in the node" in done.stderr


@pytest.mark.parametrize(("shown", "named", "expected"), [("GPU 0: H100\nGPU 1: H100\nGPU 2: H100\n", "", 3), ("", "4", 4)])
def test_whole_nodes_without_a_count_of_gpus_are_asked(folder: Path, shown: str, named: str, expected: int) -> None:
    (folder / "bin/nvidia-smi").write_text(f"#!/bin/sh\n[ $PLACE = node ] && printf '{shown}'\n")
    (folder / "bin/nvidia-smi").chmod(0o755)
    variables = {"GPUS_PER_NODE": named} if named else {}
    done, _ = run(folder, "qwen3_30b_a3b", unset="SLURM_GPUS_ON_NODE", ALLOWED="node", **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    train, doctor, *started, _ = (folder / "steps.commands").read_text().splitlines()
    assert f"world_size={expected} " in train and f"--gpus {expected} " in doctor
    assert [f"--nproc-per-node={expected} " in line for line in started if line.startswith("torchrun")] == [True]


def test_whole_nodes_whose_gpus_cannot_be_counted_end_the_job(folder: Path) -> None:
    done, _ = run(folder, "qwen3_30b_a3b", unset="SLURM_GPUS_ON_NODE", ALLOWED="node")
    assert done.returncode == 1 and "unbound variable" not in done.stderr
    assert "error: GPUS_PER_NODE: not set, Slurm counts no GPUs here" in done.stderr
    assert not (folder / "steps.commands").exists()


def test_the_servers_addresses_are_json_without_a_python(folder: Path) -> None:
    run(folder, "qwen3_30b_a3b", CONTAINER_IMAGE="/image.sqsh", SERVERS_PER_NODE="2")
    assert (folder / "run" / "endpoints.json").read_text() == '["http://127.0.0.2:21007","http://127.0.0.2:21008"]\n'


def test_a_run_whose_servers_have_all_ended_stops_at_once(folder: Path) -> None:
    """It saves what it has. That counts as a failure, unless what was left to train needed no server."""
    done, _ = run(folder, "qwen3_30b_a3b", ALLOWED="node", SERVERS_END="yes", COMPLETE="false")
    why = "the servers of all nodes have ended: serve failed, see run/logs/serve-0-*; the first failure without a new checkpoint"
    assert f"{why} since the beginning; requeued" in done.stdout
    done, _ = run(folder, "qwen3_30b_a3b", ALLOWED="node", SERVERS_END="yes")
    assert done.returncode == 0 and done.stdout.endswith("complete\n")


def test_a_requeue_that_slurm_refuses_fails_the_job(folder: Path) -> None:
    """Jobs that wait for its success must not begin. This scontrol refuses."""
    done, _ = run(folder, "qwen3_30b_a3b", ALLOWED="node", COMPLETE="false")
    assert done.returncode == 1
    assert "stopped with a checkpoint; requeued" in done.stdout and "Slurm does not requeue it" in done.stderr
