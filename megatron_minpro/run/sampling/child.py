"""The sampling process itself: `python -m megatron_minpro.run.sampling.child RUN_DIR SOCKET`. Rank 0 starts it, see process.py.

Without CUDA rank 0 forks it. It uses no Megatron-Core and touches no device. It ends with rank 0, whatever becomes of either.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from megatron_minpro.config import load_config
from megatron_minpro.run.process_settings import configure_process
from megatron_minpro.run.sampling.build import build_sampler, load
from megatron_minpro.run.sampling.channel import Channel
from megatron_minpro.tracking.run_files import CONFIG_FILE
from rollout.background import in_background


def main(arguments: list[str]) -> None:
    """Entry point of a Python of its own."""
    serve(Path(arguments[0]), socket.socket(fileno=int(arguments[1])))


def serve(run_dir: Path, connection: socket.socket) -> NoReturn:
    """Serve rank 0 until it closes the connection or is gone."""
    connection.set_inheritable(False)  # graders and tools that are started from here must not hold it open
    config = load_config(run_dir / CONFIG_FILE, [])
    configure_process(config, name="sampling", log_level=config.tracking.log_level, device_type="cpu")
    prompts = in_background(lambda: load(config), name="prompts")
    functions: dict[str, Callable[..., Any]] = {}

    def give(endpoint: str, policy_version: int) -> None:
        """See RollingWeights.give: rank 0 has the weights."""
        channel.call("give", endpoint, policy_version)

    def start(**where: Any) -> dict[str, Any]:
        """See build_sampler. Gives the prompt cursor's state; from now on the sampler can be asked."""
        sampler = build_sampler(prompts.result(), config, run_dir, give=give, **where)
        for function in (sampler.draw, sampler.collect, sampler.measure, sampler.example_tokens, sampler.close):
            functions[function.__name__] = function
        return sampler.collector.cursor.state()

    functions["start"] = start
    channel = Channel(connection, functions, other_side="rank 0", describe_end=lambda: "rank 0 has ended")
    channel.listen()
    channel.wait_until_closed()
    sys.stdout.flush()
    os._exit(0)  # at once: nobody waits for the calls under way


if __name__ == "__main__":
    main(sys.argv[1:])
