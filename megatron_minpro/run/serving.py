"""Rollout servers as a run's configuration describes them: settings for the launcher, and `minpro serve`, which runs them alone."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from checkpoints_convert.atomic_files import write_atomically
from checkpoints_convert.servable import refuse_unservable
from megatron_minpro.config import RunConfig
from megatron_minpro.run.run_folder import ENDPOINTS_FILE
from megatron_minpro.run.server_limits import progress_timeout_s
from parallel.capabilities import detect
from rollout.sglang.server import ServerPool, ServerSettings, check_port_free
from rollout.supervisor import Supervisor
from rollout.weights.loaded import check_pool

_CHECK_EVERY_S = 1.0


def server_settings(config: RunConfig, *, first_gpu: int) -> ServerSettings:
    """What every server of the run has in common. first_gpu: the first device that belongs to servers.

    Raises ValueError when the model folder or a key file is missing, or SGLang would serve another model than the folder's.
    """
    rollout = config.rollout
    refuse_unservable(Path(config.model.path))
    return ServerSettings(
        model_path=Path(config.model.path),
        device=detect().device_type,
        tp=rollout.tp,
        dtype=rollout.dtype,
        seed=config.seed,
        deterministic=config.debug.deterministic,
        first_gpu=first_gpu,
        host=rollout.host,
        api_key_path=None if rollout.api_key_path is None else Path(rollout.api_key_path),
        admin_key_path=None if rollout.admin_key_path is None else Path(rollout.admin_key_path),
        return_routes=config.actor.routing_replay == "server",
        options=config.sglang,
    )


def supervise(config: RunConfig, pool: ServerPool, *, announce: Callable[[str], None]) -> Supervisor:
    """Keeps the servers of a ready pool running, as the configuration says. announce: takes lines for people."""
    rollout = config.rollout
    return Supervisor(
        pool,
        max_restarts=rollout.max_server_restarts,
        window_s=rollout.restart_window_s,
        unresponsive_after_s=rollout.unresponsive_after_s,
        progress_timeout_s=progress_timeout_s(config),
        start_timeout_s=rollout.start_timeout_s,
        announce=announce,
    )


def describe(config: RunConfig) -> str:
    """What `serve` would start, in one line; nothing is started.

    Raises:
        ValueError: settings, a model folder, a key file or a port that cannot be used.
    """
    rollout, settings = config.rollout, server_settings(config, first_gpu=0)
    if not rollout.servers:
        raise ValueError("rollout.servers: 0, expected at least 1 to serve")
    settings.option_arguments()
    ports = "free ports" if rollout.base_port is None else f"ports from {rollout.base_port}"
    for number in range(rollout.servers):
        if rollout.base_port is not None:
            check_port_free(rollout.host, rollout.base_port + number)
    return f"{rollout.servers} server(s) of {config.model.path} would start: {rollout.dtype}, tp {rollout.tp}, {ports} of {rollout.host}"


def serve(config: RunConfig, *, folder: Path, announce: Callable[[str], None]) -> None:
    """Start the configured servers, write folder/endpoints.json once all of them answer, run until SIGINT or SIGTERM, leave nothing behind.

    folder gets the logs too; give every node its own. announce: takes lines for people.
    Raises ValueError for settings that cannot be used and rollout.sglang.server.ServerDied when a server cannot be kept running.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ENDPOINTS_FILE
    path.unlink(missing_ok=True)  # an earlier attempt's endpoints answer no longer
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    rollout = config.rollout
    announce(f"starting {rollout.servers} server(s) for {config.model.path}; logs in {folder}")
    settings = server_settings(config, first_gpu=0)
    with ServerPool.launch(settings, num_servers=rollout.servers, log_dir=folder, base_port=rollout.base_port) as pool:
        try:
            pool.wait_until_ready(rollout.start_timeout_s)
            check_pool(pool)
            write_atomically(path, json.dumps(pool.endpoints) + "\n")
            announce(f"ready: {' '.join(pool.endpoints)} (Ctrl-C ends them)")
            with closing(supervise(config, pool, announce=announce)) as supervisor:
                while True:
                    supervisor.check()
                    time.sleep(_CHECK_EVERY_S)
        except _Stopped:
            announce("ending the servers")
        finally:
            path.unlink(missing_ok=True)


class _Stopped(BaseException):
    """SIGINT or SIGTERM arrived; a BaseException so that nothing between takes it for a failure."""


def _stop(*_: object) -> None:
    raise _Stopped
