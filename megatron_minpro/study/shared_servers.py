"""Rollout servers that several cells use, one after the other: a server costs more to start than a short run costs.

A run gives the servers its own weights before it asks for anything, so nothing of the run before is left.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from megatron_minpro.config import RunConfig
from megatron_minpro.run.serving import server_settings
from rollout.sglang.server import ServerPool, ServerSettings
from rollout.weights.loaded import check_pool


class SharedServers:
    """Starts servers when a cell needs others than there are."""

    def __init__(self, log_dir: Path, say: Callable[[str], None]) -> None:
        """
        Args:
            log_dir: of the servers' logs.
            say: takes lines for people.
        """
        self._log_dir = log_dir
        self._say = say
        self._running = ExitStack()
        self._kind: tuple[ServerSettings, int] | None = None
        self._endpoints: list[str] = []

    def place(self, config: RunConfig) -> RunConfig:
        """The same run with these servers in place of its own. Its base model must be there.

        Raises:
            ValueError: settings or a model that cannot be served.
            RuntimeError: the servers do not start; with their last words.
        """
        if not config.rollout.servers:
            return config
        kind = (replace(server_settings(config, first_gpu=0), seed=0), config.rollout.servers)
        if kind != self._kind:
            self._start(kind, config)
        rollout = config.rollout.model_copy(update={"servers": 0, "endpoints": tuple(self._endpoints)})
        return config.model_copy(update={"rollout": rollout})

    def _start(self, kind: tuple[ServerSettings, int], config: RunConfig) -> None:
        self.close()
        settings, count = kind
        self._say(f"starting {count} server{'s' if count > 1 else ''}, shared by the cells")
        pool = self._running.enter_context(ServerPool.launch(settings, num_servers=count, log_dir=self._log_dir, base_port=None))
        pool.wait_until_ready(config.rollout.start_timeout_s)
        check_pool(pool)
        self._kind, self._endpoints = kind, pool.endpoints

    def close(self) -> None:
        """End them."""
        self._running.close()
        self._kind = None

    def __enter__(self) -> SharedServers:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
