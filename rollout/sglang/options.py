"""Which server arguments the installed SGLang knows: asked in the server environment, the only one that can import SGLang."""

from __future__ import annotations

import difflib
import functools
import json
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rollout.sglang.environment import link_packages, server_environment
from rollout.sglang.weight_limits import check_weight_limits

# Prints {argument name: {"flag": ..., "takes_value": ..., "default": ...}} as the last line.
_PROBE = """
import argparse, json
from rollout.sglang import cpu
cpu.install()
from sglang.srt.server_args import ServerArgs
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
known = {}
for action in parser._actions:
    flags = [flag for flag in action.option_strings if flag.startswith("--")]
    if flags and action.dest != "help":
        default = action.default if isinstance(action.default, (bool, int, float, str, type(None))) else None
        entry = {"flag": flags[0], "kind": "switch" if action.nargs == 0 else "list" if action.nargs in ("*", "+") else "value",
                 "negative": next((flag for flag in flags if flag.startswith("--no-")), None), "default": default}
        for name in {action.dest, *(flag[2:].replace("-", "_") for flag in flags)}:
            known[name] = entry
print(json.dumps(known))
"""


@functools.lru_cache(maxsize=8)
def known_options(server_python: Path, device: str) -> dict[str, dict[str, Any]]:
    """Every server argument of the SGLang beside `server_python`. Takes several seconds the first time (it imports SGLang).

    Raises ValueError when SGLang cannot be imported there, with the last line of the reason.
    """
    with tempfile.TemporaryDirectory(prefix="minpro_options_") as folder:
        probe = subprocess.run(
            [str(server_python), "-c", _PROBE],
            capture_output=True,
            text=True,
            env=server_environment(server_python, device=device, num_threads=1, packages=link_packages(Path(folder))),
            check=False,
        )
    if probe.returncode != 0:
        reason = (probe.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"the server environment {server_python} cannot list SGLang's server arguments: {reason}")
    return json.loads(probe.stdout.strip().splitlines()[-1])


def option_arguments(options: Mapping[str, Any], *, server_python: Path, device: str, reserved: Mapping[str, str]) -> list[str]:
    """Command-line arguments for `options` (names as in SGLang's ServerArgs, with underscores or dashes).

    reserved: names that are set elsewhere -> where.
    Raises ValueError naming the option when it is unknown to the installed SGLang, reserved, cannot take the value, or when the weight
    endpoints cannot honour it.
    """
    arguments: list[str] = []
    if not options:
        return arguments
    for name in options:
        if name.replace("-", "_") in reserved:
            raise ValueError(f"sglang.{name}: set by {reserved[name.replace('-', '_')]}, not here")
    check_weight_limits(options)
    known = known_options(server_python, device)
    for name, value in options.items():
        key = name.replace("-", "_")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3)
            raise ValueError(f"sglang.{name}: the installed SGLang has no such server argument; nearest: {', '.join(near) or 'none'}")
        arguments += _arguments_of(name, value, known[key])
    return arguments


def _arguments_of(name: str, value: Any, entry: Mapping[str, Any]) -> list[str]:
    if entry["kind"] == "switch":
        if not isinstance(value, bool):
            raise ValueError(f"sglang.{name} is {value!r}, expected true or false")
        if value:
            return [entry["flag"]]
        if entry["negative"] is not None:
            return [entry["negative"]]
        if entry["default"] not in (False, None):
            raise ValueError(f"sglang.{name}: SGLang offers no way to switch it off")
        return []
    if value is None:
        raise ValueError(f"sglang.{name} is null, expected a value (leave the key out for SGLang's default)")
    if entry["kind"] == "list":
        return [entry["flag"], *(str(item) for item in (value if isinstance(value, list | tuple) else [value]))]
    if isinstance(value, list | tuple | dict):
        return [entry["flag"], json.dumps(value)]
    return [entry["flag"], str(value)]
