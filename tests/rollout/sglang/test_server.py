"""Starting servers: what is refused, what is said when one dies, and that none is left behind."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from rollout import ports
from rollout.ports import check_port_free, free_ports
from rollout.sglang.server import (
    ServerDied,
    ServerPool,
    ServerSettings,
    server_command,
)

ROOT = Path(__file__).resolve().parents[3]


def with_stub_python(settings: ServerSettings, tmp_path: Path, code: str) -> ServerSettings:
    """Settings whose servers run `code` instead of SGLang; the port is the word after --port."""
    stub = tmp_path / "python"
    script = tmp_path / "stub.py"
    script.write_text("import sys\nport = int(sys.argv[sys.argv.index('--port') + 1])\n" + textwrap.dedent(code))
    stub.write_text(f'#!/bin/sh\nexec {sys.executable} -u {script} "$@"\n')
    stub.chmod(0o755)
    return dataclasses.replace(settings, server_python=stub)


READY = """
    import http.server, json
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer({})
        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            self.answer({})
        def answer(self, body):
            content = json.dumps(body).encode()
            self.send_response(200); self.send_header("content-length", str(len(content))); self.end_headers(); self.wfile.write(content)
    http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def test_a_server_that_dies_while_starting_shows_its_last_lines(server_settings: ServerSettings, tmp_path: Path) -> None:
    code = """
        import time
        if port == FIRST:
            time.sleep(60)
        print("loading"); print("RuntimeError: no such weights"); sys.exit(9)
    """
    first = next(port for port in iter(lambda: free_ports("127.0.0.1", 1)[0], None) if ports._claim(port + 1))
    settings = with_stub_python(server_settings, tmp_path, code.replace("FIRST", str(first)))
    began = time.monotonic()
    pool = ServerPool.launch(settings, num_servers=2, log_dir=tmp_path / "logs", base_port=first)
    members = [member for process in pool.processes for member in process.tree()]
    with pytest.raises(ServerDied, match=r"SGLang server 1 .*exit code 9.*server_1\.log(.|\n)*loading\n +RuntimeError: no such weights"):
        pool.wait_until_ready(60)
    assert time.monotonic() - began < 20
    assert not any(member.is_running() and member.status() != psutil.STATUS_ZOMBIE for member in members)


def test_server_that_is_not_ready_in_time_is_named_and_ended(server_settings: ServerSettings, tmp_path: Path) -> None:
    settings = with_stub_python(server_settings, tmp_path, "import time; print('compiling'); time.sleep(60)")
    with pytest.raises(ServerDied, match=r"not ready after 1 s: SGLang server 0(.|\n)*compiling"):
        ServerPool.start(settings, num_servers=1, log_dir=tmp_path / "logs", start_timeout_s=1)


def test_a_server_that_died_is_described_and_can_be_started_again(server_settings: ServerSettings, tmp_path: Path) -> None:
    with ServerPool.start(
        with_stub_python(server_settings, tmp_path, READY), num_servers=2, log_dir=tmp_path / "logs", start_timeout_s=20
    ) as pool:
        os.kill(pool.processes[1].pid, signal.SIGKILL)
        pool.processes[1].wait(5)
        assert re.match(r"SGLang server 1 .*SIGKILL", pool.processes[1].describe_end())
        pool.restart(1, start_timeout_s=20)
        assert all(process.is_running for process in pool.processes)
    assert not any(process.is_running for process in pool.processes)


def test_port_in_use_is_refused_in_one_line_before_anything_starts(server_settings: ServerSettings, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            ValueError, match=rf"^rollout\.base_port: port {port} on 127\.0\.0\.1 cannot be used \(Address already in use\); choose another"
        ):
            ServerPool.start(server_settings, num_servers=1, log_dir=tmp_path / "logs", start_timeout_s=5, base_port=port)
    assert not (tmp_path / "logs").exists()
    check_port_free("127.0.0.1", port)


def test_address_outside_loopback_demands_both_keys(server_settings: ServerSettings, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("k\n")
    with pytest.raises(ValueError, match=r"rollout\.host is 0\.0\.0\.0, reachable from outside"):
        dataclasses.replace(server_settings, host="0.0.0.0")
    with pytest.raises(ValueError, match="admin key file"):
        dataclasses.replace(server_settings, host="10.0.0.7", api_key_path=key)
    settings = dataclasses.replace(server_settings, host="0.0.0.0", api_key_path=key, admin_key_path=key)
    assert settings.api_key == "k"


def test_keys_are_in_a_file_that_only_the_owner_can_read(server_settings: ServerSettings, tmp_path: Path) -> None:
    (tmp_path / "api").write_text("api-secret")
    (tmp_path / "admin").write_text("admin-secret")
    settings = dataclasses.replace(
        with_stub_python(server_settings, tmp_path, READY), api_key_path=tmp_path / "api", admin_key_path=tmp_path / "admin"
    )
    with ServerPool.start(settings, num_servers=1, log_dir=tmp_path / "logs", start_timeout_s=20) as pool:
        assert "secret" not in " ".join(pool.processes[0].command)
        file = Path(pool.processes[0].command[pool.processes[0].command.index("--config") + 1])
        assert json.loads(file.read_text()) == {"api-key": "api-secret", "admin-api-key": "admin-secret"}
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
        pool.restart(0, start_timeout_s=20)
    assert not file.exists()


def test_dying_server_that_printed_its_keys_does_not_show_them(server_settings: ServerSettings, tmp_path: Path) -> None:
    (tmp_path / "api").write_text("api-secret")
    (tmp_path / "admin").write_text("admin-secret")
    stub = with_stub_python(server_settings, tmp_path, "print(open(sys.argv[sys.argv.index('--config') + 1]).read()); sys.exit(1)")
    settings = dataclasses.replace(stub, api_key_path=tmp_path / "api", admin_key_path=tmp_path / "admin")
    with pytest.raises(ServerDied, match=r"\[redacted\].*\[redacted\]") as refused:
        ServerPool.start(settings, num_servers=1, log_dir=tmp_path / "logs", start_timeout_s=20)
    assert "secret" not in str(refused.value)
    log = tmp_path / "logs/server_0.log"
    assert "admin-secret" in log.read_text() and stat.S_IMODE(log.stat().st_mode) == 0o600


def test_waiting_for_servers_can_be_broken_off_and_leaves_none(server_settings: ServerSettings, tmp_path: Path) -> None:
    calls: list[float] = []

    def should_abort() -> None:
        calls.append(time.monotonic())
        if len(calls) == 4:
            raise KeyError("a rank died")

    settings = with_stub_python(server_settings, tmp_path, "import time; time.sleep(60)")
    pool = ServerPool.launch(settings, num_servers=2, log_dir=tmp_path / "logs")
    members = [member for process in pool.processes for member in process.tree()]
    began = time.monotonic()
    with pytest.raises(KeyError, match="a rank died"):
        pool.wait_until_ready(60, should_abort=should_abort)
    assert time.monotonic() - began < 5
    assert max(later - earlier for earlier, later in itertools.pairwise(calls)) < 1
    assert not any(member.is_running() and member.status() != psutil.STATUS_ZOMBIE for member in members)


def test_callback_that_says_nothing_does_not_disturb_the_start(server_settings: ServerSettings, tmp_path: Path) -> None:
    ready: list[int] = []
    pool = ServerPool.launch(with_stub_python(server_settings, tmp_path, READY), num_servers=2, log_dir=tmp_path / "logs")
    with pool:
        pool.wait_until_ready(20, should_abort=lambda: ready.append(pool.num_ready))
        assert all(process.is_running for process in pool.processes)
    assert ready[0] == 0 and pool.num_ready == 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": "tpu"}, "device is 'tpu', expected cpu or cuda"),
        ({"dtype": "int4"}, r"rollout\.dtype is 'int4'"),
        ({"first_gpu": -1}, "first_gpu is -1, expected 0 or more"),
        ({"tp": 0}, r"rollout\.tp is 0"),
        ({"tp": 2}, r"rollout\.tp is 2, expected 1 on the CPU"),
        ({"model_path": Path("/nowhere")}, r"model\.path: /nowhere holds no config\.json"),
        ({"api_key_path": Path("/nowhere/key")}, "api_key_path: cannot read /nowhere/key"),
    ],
)
def test_wrong_settings_are_refused_by_name(server_settings: ServerSettings, changes: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        dataclasses.replace(server_settings, **changes)  # type: ignore[arg-type]


def test_cuda_servers_get_devices_of_their_own_and_no_cpu_settings(server_settings: ServerSettings) -> None:
    settings = dataclasses.replace(server_settings, device="cuda", tp=4, dtype="bfloat16", deterministic=False)
    command = server_command(settings, port=8100, index=1, option_arguments=["--mem-fraction-static", "0.8"], key_file=None)
    assert command[1:3] == ["-m", "sglang.launch_server"]
    said = dict(itertools.pairwise(command))
    assert (said["--device"], said["--tp-size"], said["--base-gpu-id"], said["--dtype"], said["--port"]) == (
        "cuda",
        "4",
        "4",
        "bfloat16",
        "8100",
    )
    behind_trainer = server_command(dataclasses.replace(settings, first_gpu=2), port=8100, index=1, option_arguments=[], key_file=None)
    assert dict(itertools.pairwise(behind_trainer))["--base-gpu-id"] == "6"
    assert said["--mem-fraction-static"] == "0.8"
    assert not {"--attention-backend", "--disable-radix-cache", "--max-total-tokens", "--enable-deterministic-inference"} & set(command)
    assert "--enable-deterministic-inference" in server_command(
        dataclasses.replace(settings, deterministic=True), port=1, index=0, option_arguments=[], key_file=None
    )


@pytest.mark.servers
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"max_prefil_tokens": 4096},
            r"sglang\.max_prefil_tokens: the installed SGLang has no such server argument; nearest: max_prefill_tokens",
        ),
        ({"port": 1}, r"sglang\.port: set by rollout\.base_port, not here"),
        ({"disable_cuda_graph": "yes"}, r"sglang\.disable_cuda_graph is 'yes', expected true or false"),
        ({"chunked_prefill_size": None}, r"sglang\.chunked_prefill_size is null"),
    ],
)
def test_sglang_option_that_cannot_be_honoured_is_refused_by_name(
    server_settings: ServerSettings, options: dict[str, object], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        dataclasses.replace(server_settings, options=options).option_arguments()


@pytest.mark.servers
def test_sglang_options_become_arguments(server_settings: ServerSettings) -> None:
    options = {"chunked-prefill-size": 512, "disable_cuda_graph": True, "enable_metrics": False, "schedule_policy": "fcfs"}
    arguments = dataclasses.replace(server_settings, options=options).option_arguments()
    assert arguments == ["--chunked-prefill-size", "512", "--disable-cuda-graph", "--schedule-policy", "fcfs"]


@pytest.mark.servers
def test_real_server_that_cannot_load_its_model_shows_why(server_settings: ServerSettings, model_folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "model"
    broken.mkdir()
    (broken / "config.json").write_text((model_folder / "config.json").read_text())
    settings = dataclasses.replace(server_settings, model_path=broken)
    with pytest.raises(ServerDied, match=r"(?s)SGLang server 0 .*Cannot find any model weights"):
        ServerPool.start(settings, num_servers=1, log_dir=tmp_path / "logs", start_timeout_s=200)


@pytest.mark.servers
def test_no_server_process_outlives_a_parent_that_is_killed(model_folder: Path, tmp_path: Path) -> None:
    code = f"""
        import time
        from pathlib import Path
        from rollout.sglang.server import ServerPool, ServerSettings
        settings = ServerSettings(model_path=Path({str(model_folder)!r}), device="cpu", tp=1, dtype="float32", seed=0, deterministic=True)
        pool = ServerPool.start(settings, num_servers=1, log_dir=Path({str(tmp_path)!r}), start_timeout_s=200)
        print(*(member.pid for member in pool.processes[0].tree()), flush=True)
        time.sleep(600)
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, cwd=ROOT, text=True)
    assert parent.stdout is not None
    members = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
    assert len(members) >= 3, "server, scheduler and detokenizer"
    parent.kill()
    parent.wait(10)
    _, alive = psutil.wait_procs(members, timeout=10)
    assert alive == []
