from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_minpro import cli
from megatron_minpro.config import load_config
from megatron_minpro.run import base_model
from megatron_minpro.run.serving import server_settings
from rollout.sglang import control as sglang_control

REPOSITORY = Path(__file__).resolve().parents[3]
TINY = REPOSITORY / "configs/tiny_moe_cpu.yaml"


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A random model of the shipped configuration's shape."""
    folder = tmp_path / "model"
    config = load_config(TINY, [f"model.path={folder}", "model.warm_up.num_steps=0"])
    base_model.write_initial_model(config.model, config.prompts, folder)
    return folder


def test_server_settings_are_those_of_the_configuration(model_folder: Path) -> None:
    config = load_config(TINY, [f"model.path={model_folder}", "seed=3", "sglang={chunked_prefill_size: 512}", "debug.deterministic=false"])
    settings = server_settings(config, first_gpu=2)
    assert settings.first_gpu == 2
    assert (settings.model_path, settings.tp, settings.dtype, settings.seed) == (model_folder, 1, "float32", 3)
    assert (settings.host, settings.deterministic, settings.options) == ("127.0.0.1", False, {"chunked_prefill_size": 512})


def test_a_folder_that_sglang_would_serve_as_another_model_is_refused(model_folder: Path) -> None:
    config = load_config(TINY, [f"model.path={model_folder}"])
    (model_folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"model/adapter_config\.json: an adapter, which is not read; expected a folder of whole weights"):
        server_settings(config, first_gpu=0)
    (model_folder / "adapter_config.json").unlink()
    fields = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps({**fields, "tie_word_embeddings": True}))
    with pytest.raises(ValueError, match=r"config\.json: tie_word_embeddings is True in a qwen3_moe model; expected False \(SGLang"):
        server_settings(config, first_gpu=0)


def version_or_none(endpoint: str) -> str | None:
    try:
        return sglang_control.weight_version(endpoint, key=None, timeout_s=10.0)
    except sglang_control.ServerRefused:
        return None


@pytest.mark.servers
def test_serve_restarts_a_killed_server_and_leaves_no_process_behind(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "servers"
    command = [sys.executable, "-m", "megatron_minpro.cli", "serve", str(TINY), f"model.path={model_folder}", "--folder", str(folder)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    try:
        deadline = time.monotonic() + 900
        while not (folder / "endpoints.json").exists():
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline, "no endpoints in time"
            time.sleep(0.2)
        [endpoint] = json.loads((folder / "endpoints.json").read_text())
        assert sglang_control.weight_version(endpoint, key=None, timeout_s=10.0) == "0"
        [server] = [child for child in psutil.Process(process.pid).children() if "rollout.sglang.cpu" in " ".join(child.cmdline())]
        server.kill()
        while version_or_none(endpoint) != "-1":
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline, "not restarted in time"
            time.sleep(0.2)
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert (process.returncode, err) == (0, "")
    assert f"ready: {endpoint}" in out and "was ended by SIGKILL; restarting it (1 of at most 5 times)" in out
    assert not (folder / "endpoints.json").exists()
    psutil.wait_procs(children, timeout=30)
    assert [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE] == []


def test_a_dry_run_of_serve_checks_and_starts_nothing(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(tmp_path.rglob("*"))
    command = ["serve", str(TINY), f"model.path={model_folder}", f"output_dir={tmp_path}/runs", "--dry-run"]
    assert cli.run(command) == 0
    assert capsys.readouterr().out == f"1 server(s) of {model_folder} would start: float32, tp 1, free ports of 127.0.0.1\n"
    for settings, words in ((["rollout.tp=2"], "rollout.tp is 2, expected 1 on the CPU"), (["rollout.api_key_path=absent"], "cannot read")):
        assert cli.run([*command, *settings]) == 2
        assert words in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
