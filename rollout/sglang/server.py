"""Start, restart and stop SGLang servers (supervisor.py watches them): one process tree per server, on loopback unless keys are given.

On the CPU a server is started through rollout/sglang/cpu, on CUDA through SGLang's own launcher; everything else is the same code.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from rollout.background import in_background
from rollout.loopback import LOOPBACK_INTERFACE, is_loopback
from rollout.ports import check_port_free, free_ports
from rollout.processes import ManagedProcess, spawn, terminate_all
from rollout.sglang import control as sglang_control
from rollout.sglang.environment import default_server_python, link_packages, server_environment
from rollout.sglang.options import option_arguments
from rollout.sglang.route_limits import MOE_RUNNER, check_route_limits

Device = Literal["cpu", "cuda"]

_ABORT_POLL_S = 0.2
_HUNG_DEADLINE_S = 2.0  # a server that is restarted has nothing left to do

# Set by this file from typed fields: refused among the extra options, so that one thing is said in one place.
_RESERVED = {
    "model_path": "model.path",
    "model": "model.path",
    "host": "rollout.host",
    "port": "rollout.base_port",
    "tp_size": "rollout.tp",
    "tensor_parallel_size": "rollout.tp",
    "tp": "rollout.tp",
    "dtype": "rollout.dtype",
    "device": "the device of the run",
    "api_key": "the key file",
    "admin_api_key": "the key file",
    "weight_version": "the policy version",
    "skip_tokenizer_init": "text_api",
    "skip_server_warmup": "the server pool, which warms servers up itself",
    "base_gpu_id": "the server pool",
    "nccl_port": "the server pool",
    "enable_deterministic_inference": "debug.deterministic",
    "random_seed": "seed",
    "config": "these options themselves",
}

# What a restarted server reports as its weight version. No trainer asks for it: also a server that held the model folder's own weights
# gets them published again, and so is seen to have been restarted.
RESTARTED_VERSION = -1


class ServerDied(RuntimeError):
    """A server ended, or did not become ready in time. The message holds its last log lines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """What every server of a pool has in common.

    model_path: Hugging Face folder. dtype: float32 | bfloat16 | float16. policy_version: the version of the weights in that folder.
    seed: of the engine's own draws (requests with a seed of their own do not use it).
    deterministic: responses to a seeded request repeat. Always so on the CPU; on CUDA it costs speed (SGLang's deterministic inference).
    first_gpu: of server 0 on CUDA, counted among the devices that this process sees; server i takes tp devices from first_gpu + i * tp on.
    num_threads: torch threads per server on the CPU. max_total_tokens: KV cache on the CPU, in tokens (CUDA: SGLang decides by memory).
    api_key_path, admin_key_path: files with one line each; both are required unless host is a loopback address.
    text_api: also answer the OpenAI endpoints (/v1/...); the server then has a tokenizer.
    return_routes: the server can tell which experts the tokens of a request visited.
    options: further SGLang server arguments by name; unknown ones are refused.
    """

    model_path: Path
    device: Device
    tp: int
    dtype: str
    seed: int
    deterministic: bool
    policy_version: int = 0
    first_gpu: int = 0
    host: str = "127.0.0.1"
    num_threads: int = 1
    max_total_tokens: int = 65536
    max_running_requests: int = 256
    api_key_path: Path | None = None
    admin_key_path: Path | None = None
    text_api: bool = False
    return_routes: bool = False
    server_python: Path = field(default_factory=default_server_python)
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not Path(self.model_path).is_absolute():  # a server's working folder is another
            raise ValueError(f"model.path: {self.model_path} is relative, expected an absolute path")
        if not (Path(self.model_path) / "config.json").is_file():
            raise ValueError(f"model.path: {self.model_path} holds no config.json, expected a Hugging Face model folder")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device is {self.device!r}, expected cpu or cuda")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"rollout.dtype is {self.dtype!r}, expected float32, bfloat16 or float16")
        if self.first_gpu < 0:
            raise ValueError(f"first_gpu is {self.first_gpu}, expected 0 or more")
        if self.tp < 1:
            raise ValueError(f"rollout.tp is {self.tp}, expected at least 1")
        if self.device == "cpu" and self.tp != 1:
            raise ValueError(
                f"rollout.tp is {self.tp}, expected 1 on the CPU (SGLang's CPU engine without its kernels knows no tensor parallelism)"
            )
        if not is_loopback(self.host) and (self.api_key_path is None or self.admin_key_path is None):
            raise ValueError(
                f"rollout.host is {self.host}, reachable from outside: expected an api key file and an admin key file (or 127.0.0.1)"
            )
        if self.return_routes:
            check_route_limits(self.options)
        for name, path in (("api_key_path", self.api_key_path), ("admin_key_path", self.admin_key_path)):
            if path is not None:
                read_key(path, name=name)

    @property
    def api_key(self) -> str | None:
        return None if self.api_key_path is None else read_key(self.api_key_path, name="api_key_path")

    @property
    def admin_key(self) -> str | None:
        """The key of the control endpoints. SGLang falls back on the api key where no admin key is set; so does this."""
        own = None if self.admin_key_path is None else read_key(self.admin_key_path, name="admin_key_path")
        return sglang_control.control_key(api_key=self.api_key, admin_key=own)

    def option_arguments(self) -> list[str]:
        """The extra options as command-line arguments. Raises ValueError naming an unknown option. Slow the first time if there are any."""
        return option_arguments(self.options, server_python=self.server_python, device=self.device, reserved=_RESERVED)


def check_options(options: Mapping[str, Any], *, device: Device) -> None:
    """Raises ValueError naming an option that the installed SGLang does not know, or that is set elsewhere. No model is needed."""
    option_arguments(options, server_python=default_server_python(), device=device, reserved=_RESERVED)


def read_key(path: Path, *, name: str) -> str:
    """The key in a one-line file. Raises ValueError when the file cannot be read or is empty."""
    try:
        key = Path(path).read_text().strip()
    except OSError as error:
        raise ValueError(f"{name}: cannot read {path}: {error.strerror}") from error
    if not key or "\n" in key:
        raise ValueError(f"{name}: {path} holds {'nothing' if not key else 'several lines'}, expected one line with a key")
    return key


def server_command(
    settings: ServerSettings, *, port: int, index: int, option_arguments: list[str], key_file: Path | None, restarted: bool = False
) -> list[str]:
    """The command line of server number `index` of a pool."""
    version = RESTARTED_VERSION if restarted else settings.policy_version
    entry = "rollout.sglang.cpu" if settings.device == "cpu" else "sglang.launch_server"
    command = [str(settings.server_python), "-m", entry, "--model-path", str(settings.model_path)]
    command += ["--host", settings.host, "--port", str(port), "--device", settings.device, "--dtype", settings.dtype]
    command += ["--tp-size", str(settings.tp), "--weight-version", str(version), "--random-seed", str(settings.seed)]
    if not settings.text_api:
        command += ["--skip-tokenizer-init"]  # token ids go in and out
    # Warming up is done by the pool, with the request it will really send.
    command += ["--skip-server-warmup", "--sleep-on-idle"]
    command += ["--log-level-http", "warning"]  # otherwise a line per request
    if settings.device == "cpu":
        command += ["--attention-backend", "torch_native", "--disable-overlap-schedule", "--mem-fraction-static", "0.1"]
        # No prefix cache: for short prompts it costs more than it saves, and without it a response does not depend on earlier calls.
        command += ["--disable-radix-cache"]
        command += ["--max-total-tokens", str(settings.max_total_tokens), "--max-running-requests", str(settings.max_running_requests)]
    else:
        command += ["--base-gpu-id", str(settings.first_gpu + index * settings.tp)]
        if settings.deterministic:
            command += ["--enable-deterministic-inference"]
    if settings.return_routes:
        command += ["--enable-return-routed-experts"]
        if settings.device == "cuda":
            command += ["--moe-runner-backend", MOE_RUNNER]
    if key_file is not None:
        command += ["--config", str(key_file)]
    return command + option_arguments


class ServerPool:
    """Running servers. Use as a context manager: leaving it ends them all.

    with ServerPool.start(settings, num_servers=1, log_dir=run / "logs", start_timeout_s=300, base_port=None) as pool:
        client = GenerationClient(pool.endpoints, ...)
    """

    def __init__(self, settings: ServerSettings, *, ports: list[int], log_dir: Path, option_arguments: list[str]) -> None:
        self.settings = settings
        self._ports = ports
        self._log_dir = log_dir
        self._option_arguments = option_arguments
        self._servers: list[ManagedProcess] = []
        self._stopped = False
        self._num_ready = 0
        self._lock = threading.Lock()
        # Only this user can enter it. Holds the key file and the sockets between a server's processes: a short path (the system allows
        # 107 bytes), and one place to clean up.
        self._private_dir = Path(tempfile.mkdtemp(prefix="minpro_servers_"))
        self._packages = link_packages(self._private_dir)
        self._key_file: Path | None = None

    @classmethod
    def start(
        cls, settings: ServerSettings, *, num_servers: int, log_dir: Path, start_timeout_s: float, base_port: int | None = None
    ) -> ServerPool:
        """Start `num_servers` servers at once and wait until each has answered a generation request.

        base_port: server i listens on base_port + i; None: free ports. log_dir gets server_0.log, server_1.log, ...
        Raises ValueError (wrong option, port in use) before anything starts, ServerDied when a server ends or is not ready in time
        (then no server is left running).
        """
        pool = cls.launch(settings, num_servers=num_servers, log_dir=log_dir, base_port=base_port)
        pool.wait_until_ready(start_timeout_s)
        return pool

    @classmethod
    def launch(cls, settings: ServerSettings, *, num_servers: int, log_dir: Path, base_port: int | None = None) -> ServerPool:
        """Start the processes without waiting: other work can be done meanwhile. Call `wait_until_ready` before use."""
        if num_servers < 1:
            raise ValueError(f"rollout.servers is {num_servers}, expected at least 1")
        if base_port is None:
            ports = free_ports(settings.host, num_servers)
        else:
            ports = [base_port + index for index in range(num_servers)]
            for port in ports:
                check_port_free(settings.host, port)
        pool = cls(settings, ports=ports, log_dir=log_dir, option_arguments=settings.option_arguments())
        try:
            pool._key_file = pool._write_key_file()
            for index in range(num_servers):
                pool._servers.append(pool._spawn(index))
        except BaseException:
            pool.stop()
            raise
        return pool

    @property
    def endpoints(self) -> list[str]:
        host = "127.0.0.1" if self.settings.host == "0.0.0.0" else self.settings.host
        host = f"[{host}]" if ":" in host else host
        return [f"http://{host}:{port}" for port in self._ports]

    @property
    def num_ready(self) -> int:
        """How many servers have answered since the pool was launched."""
        return self._num_ready

    @property
    def processes(self) -> list[ManagedProcess]:
        return list(self._servers)

    def wait_until_ready(self, start_timeout_s: float, *, should_abort: Callable[[], None] | None = None) -> None:
        """Returns when every server has answered a generation request. Raises ServerDied otherwise, with all servers ended.

        should_abort: called in this thread about five times a second; whatever it raises ends all servers, too, and is raised.
        """
        try:
            deadline = time.monotonic() + start_timeout_s
            pending = {
                in_background(partial(self._wait_for, index, deadline, start_timeout_s), name=f"start of {server.name}")
                for index, server in enumerate(self._servers)
            }
            while pending:
                if should_abort is not None:
                    should_abort()
                done, pending = wait(pending, timeout=_ABORT_POLL_S, return_when=FIRST_EXCEPTION)
                for ready in done:
                    ready.result()
                    self._num_ready += 1
        except BaseException:
            self.stop()
            raise

    def restart(self, index: int, *, start_timeout_s: float) -> None:
        """End what is left of server `index` and start it again on the same port, with the weights of the model folder.

        It reports RESTARTED_VERSION until weights are published to it. Raises ServerDied when it is not ready in time.
        """
        with self._lock:
            if self._stopped:
                raise ServerDied(f"{self._servers[index].name} was not restarted: the pool is stopped")
            self._servers[index].terminate(_HUNG_DEADLINE_S)
            self._servers[index] = self._spawn(index, restarted=True)
        self._wait_for(index, time.monotonic() + start_timeout_s, start_timeout_s)

    def stop(self, deadline_s: float = 3.0) -> None:
        """End all servers; nothing of them is left afterwards. Safe to call again."""
        with self._lock:  # a restart under way leaves no server that is not seen here
            self._stopped = True
        terminate_all(self._servers, deadline_s=deadline_s)
        shutil.rmtree(self._private_dir, ignore_errors=True)

    def __enter__(self) -> ServerPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def _spawn(self, index: int, *, restarted: bool = False) -> ManagedProcess:
        command = server_command(
            self.settings,
            port=self._ports[index],
            index=index,
            option_arguments=self._option_arguments,
            key_file=self._key_file,
            restarted=restarted,
        )
        environment = server_environment(
            self.settings.server_python, device=self.settings.device, num_threads=self.settings.num_threads, packages=self._packages
        )
        environment["TMPDIR"] = str(self._private_dir)
        if is_loopback(self.settings.host):  # whoever talks to it is on this host: gloo's connections need no other interface
            environment["GLOO_SOCKET_IFNAME"] = LOOPBACK_INTERFACE
        keys = (self.settings.api_key, self.settings.admin_key)
        return spawn(
            command,
            log_path=self._log_dir / f"server_{index}.log",
            env=environment,
            name=f"SGLang server {index}",
            secrets=tuple(key for key in keys if key is not None),
        )

    def _write_key_file(self) -> Path | None:
        """Keys travel in a file that only this user can read: a command line can be read by everybody on the machine."""
        if self.settings.api_key is None and self.settings.admin_key is None:
            return None
        keys = {"api-key": self.settings.api_key, "admin-api-key": self.settings.admin_key}
        path = self._private_dir / "server_keys.yaml"
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump({name: key for name, key in keys.items() if key is not None}, file)
        return path

    def _wait_for(self, index: int, deadline: float, start_timeout_s: float) -> None:
        server, endpoint = self._servers[index], self.endpoints[index]
        while not self._answers(endpoint, deadline):
            if self._stopped:  # another server failed: the pool is already being ended
                raise ServerDied(f"{server.name} was not waited for")
            if not server.is_running:
                raise ServerDied(server.describe_end())
            if time.monotonic() > deadline:
                raise ServerDied(f"not ready after {start_timeout_s:g} s: {server.describe_end()}")
            time.sleep(0.1)

    def _answers(self, endpoint: str, deadline: float) -> bool:
        probe = {"input_ids": [0], "sampling_params": {"max_new_tokens": 1, "temperature": 1.0}, "return_logprob": True}
        try:
            sglang_control.call(endpoint, "/health", key=None, timeout_s=5.0)
            remaining_s = max(1.0, deadline - time.monotonic())
            sglang_control.call(endpoint, "/generate", probe, key=self.settings.api_key, timeout_s=remaining_s)
        except sglang_control.ServerRefused:
            return False
        return True
