"""What an attempt runs with, as the first rank knows it: its own environment and machine, and what the servers say of theirs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from megatron_minpro.tracking.versions import UNKNOWN, installed_versions, machine_facts
from parallel.capabilities import Capabilities
from rollout.sglang.control import ServerRefused, engine_version

log = logging.getLogger(__name__)


def attempt_versions(capabilities: Capabilities, endpoints: Sequence[str], *, key: str | None, timeout_s: float) -> dict[str, str]:
    """Name -> version or name of a machine's part.

    Args:
        capabilities: of this machine.
        endpoints: of the servers.
        key: their api key.
        timeout_s: of a question to a server.
    """
    of_engine = {} if capabilities.transformer_engine_version is None else {"transformer-engine": capabilities.transformer_engine_version}
    gpu = {"gpu": capabilities.device_name} if capabilities.cuda_devices else {}
    return {**installed_versions(), **of_engine, **_servers(endpoints, key, timeout_s), **machine_facts(), **gpu}


def _servers(endpoints: Sequence[str], key: str | None, timeout_s: float) -> dict[str, str]:
    """All are asked at once: the run waits for the slowest one, not for all of them one after the other."""
    if not endpoints:
        return {}
    with ThreadPoolExecutor(len(endpoints)) as threads:
        told = set(threads.map(lambda endpoint: _engine_version(endpoint, key, timeout_s), endpoints))
    return {"sglang": ", ".join(sorted(told))}


def _engine_version(endpoint: str, key: str | None, timeout_s: float) -> str:
    try:
        told = engine_version(endpoint, key=key, timeout_s=timeout_s)
    except ServerRefused as error:  # the run has better reasons to end
        log.warning("the version of a server is not known: %s", error)
        told = None
    return UNKNOWN if told is None else told
