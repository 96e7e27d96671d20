"""The sampling process as rank 0 uses it, without servers: what it loads, how it is asked, and who ends with whom."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_minpro.config import RunConfig, dump_config, load_config
from megatron_minpro.data.prompts import PromptCursor
from megatron_minpro.data.sources import load_prompts
from megatron_minpro.run.sampling.channel import ChannelClosed
from megatron_minpro.run.sampling.process import SamplingProcess
from megatron_minpro.tracking.run_files import CONFIG_FILE
from rollout.background import in_background
from rollout.client import RolloutFailed

ROOT = Path(__file__).resolve().parents[4]
NOBODY = "http://127.0.0.1:9"  # the port of the discard service
START = {"endpoints": [NOBODY], "next_step": 0, "device_type": "cpu"}

RANK_0 = """
import sys, time
from pathlib import Path
from megatron_minpro.run.sampling.process import SamplingProcess

process = SamplingProcess(Path(sys.argv[1]), forked=sys.argv[2] == "forked")
process.start(cursor=None, endpoints=["http://127.0.0.1:9"], next_step=0, device_type="cpu")
print("pid", process.pid, len(process.example_tokens(3)), flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    from megatron_minpro.tasks.arithmetic_chains.tokenizer import build_tokenizer

    model = tmp_path_factory.mktemp("model")
    build_tokenizer(model)
    (model / "config.json").write_text("{}")
    settings = [f"model.path={model}", "prompts.options.size=500", "rollout.start_timeout_s=0.2", "rollout.max_retries=0"]
    return load_config(ROOT / "configs/tiny_moe_cpu.yaml", settings)


@pytest.fixture(scope="module")
def run_dir(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    (folder / CONFIG_FILE).write_text(dump_config(config))
    return folder


@pytest.fixture(scope="module")
def sampling(run_dir: Path) -> Iterator[tuple[SamplingProcess, dict[str, Any]]]:
    """One that has been started, and its cursor."""
    process = SamplingProcess(run_dir)
    yield process, process.start(cursor=None, **START)
    process.close()
    assert not psutil.pid_exists(process.pid)


def gone(pid: int, *, within_s: float = 20) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def test_it_begins_with_the_prompts_of_the_configuration(
    sampling: tuple[SamplingProcess, dict[str, Any]], config: RunConfig, chain_tokenizer: Any
) -> None:
    process, cursor = sampling
    source, _ = load_prompts(tokenizer=chain_tokenizer, **config.prompts.model_dump())
    here = PromptCursor(source, seed=config.seed)
    assert cursor == json.loads(json.dumps(here.state())) == here.state()
    assert process.example_tokens(3) == [source[index].token_ids for index in range(3)]


def test_a_failed_batch_draws_its_prompts_again(sampling: tuple[SamplingProcess, dict[str, Any]]) -> None:
    process, _ = sampling
    for _ in range(2):
        with pytest.raises(RolloutFailed, match=rf"^no server answered within 0\.2 s: {NOBODY}"):
            process.collect(0, policy_version=0)


def test_signals_for_the_run_do_not_end_it(sampling: tuple[SamplingProcess, dict[str, Any]]) -> None:
    process, _ = sampling
    for number in (signal.SIGINT, signal.SIGUSR1):
        os.kill(process.pid, number)
    assert len(process.example_tokens(2)) == 2


def test_a_cursor_of_other_prompts_is_refused(sampling: tuple[SamplingProcess, dict[str, Any]]) -> None:
    process, cursor = sampling
    with pytest.raises(ValueError, match="prompt cursor") as refused:
        process.start(cursor={**cursor, "seed": 5}, **START)
    assert str(refused.value) == "prompt cursor: the saved state has seed = 5, this run has 0"


def test_a_killed_one_is_named_by_every_call(run_dir: Path) -> None:
    process = SamplingProcess(run_dir)
    os.kill(process.pid, signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(ChannelClosed, match=rf"^the sampling process \(pid {process.pid}\) was ended by SIGKILL$"):
            process.collect(0, policy_version=0)


def test_it_ends_with_a_batch_under_way_and_its_requests_end_too(run_dir: Path) -> None:
    process = SamplingProcess(run_dir)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        process.start(cursor=None, **(START | {"endpoints": [f"http://127.0.0.1:{silent.getsockname()[1]}"]}))
        batch = in_background(lambda: process.collect(0, policy_version=0), name="batch")
        connection, _ = silent.accept()
        with connection:
            assert connection.recv(65536)
            process.close()
            assert not psutil.pid_exists(process.pid)
            connection.settimeout(20)
            assert connection.recv(65536) == b"", "the server is told that nobody waits for its answer"
    with pytest.raises(ChannelClosed):
        batch.result(timeout=20)


@pytest.mark.parametrize("how", ["forked", "executed"])
def test_it_ends_at_once_with_rank_0(how: str, run_dir: Path) -> None:
    rank_0 = subprocess.Popen([sys.executable, "-c", RANK_0, str(run_dir), how], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert rank_0.stdout is not None
    line = next(line for line in rank_0.stdout if line.startswith("pid "))  # among what the process logs
    pid, prompts = map(int, line.split()[1:])
    sampling = psutil.Process(pid)
    assert (prompts, sampling.name()) == (3, "sampling")
    assert (sampling.cmdline() == psutil.Process(rank_0.pid).cmdline()) == (how == "forked")
    for number in (signal.SIGINT, signal.SIGUSR1):
        os.kill(pid, number)
    assert not gone(pid, within_s=0.2)
    rank_0.kill()
    rank_0.wait()
    assert gone(pid, within_s=5)
