"""What routing replay changes between a real server and a real trainer of the same weights, and what experts cost on their way.

python tests/benchmarks/routing_replay.py runs/routing_replay

The main job on one rank and one server, staleness 2, three batches: all are sampled under the first weights, with the same seeds, so every
run of one dtype trains the same tokens at three lags. Two runs for each row: pi_old of the trainer and four updates a step; pi_old of the
server and one update, whose first ratios compare server and trainer alone. Six minutes on two cores.
"""

from __future__ import annotations

import base64
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_convert.hf_config import Architecture
from megatron_minpro.batch.routing_file import RoutingAppender
from megatron_minpro.config import load_config
from megatron_minpro.tracking.metrics_file import METRICS_FILE, read_metrics

_ROOT = Path(__file__).resolve().parents[2]
_CONFIG = "configs/tiny_moe_cpu.yaml"
_DTYPES = {"float32": "fp32", "bfloat16": "bf16"}
_REPLAYS = ("none", "trainer", "server")
_SETTINGS = (
    *("world_size=1", "parallel.ep=1", "staleness=2", "num_global_steps=3", "rollout.prompts_per_step=16", "evaluation=null"),
    *("tracking.trackers=[]", "checkpoint.every=1000"),
)
_HEAD = (
    *("", "`routing_replay`", "sets: server, trainer", "log-prob gap", "min. prefix ratio: server, trainer"),
    *("sets: now, replayed (lag 8 to 11)", "min. prefix ratio at lag 0 to 3", "4 to 7", "8 to 11"),
)


def main(folder: Path) -> None:
    """Print both tables. folder: gets the runs; those of an earlier call go."""
    shutil.rmtree(folder, ignore_errors=True)
    model = [f"model.path={folder / 'base_model'}"]
    once = ("model.warm_up.num_steps=300", "name=base", "staleness=0", "num_global_steps=1")  # makes the model, in fp32
    _minpro("train", *model, f"output_dir={folder}", *_SETTINGS, *once)
    model.append("model.warm_up=null")
    print(f"| {' | '.join(_HEAD)} |\n|{'---|' * len(_HEAD)}")
    for dtype, short in _DTYPES.items():
        dtypes = [f"model.dtype={dtype}", f"rollout.dtype={dtype}"]
        with _server(folder / f"server_{dtype}", [*model, *dtypes]) as endpoint:
            for replay in _REPLAYS:
                lines = {
                    behaviour: _train(
                        folder,
                        f"{dtype}_{replay}_{behaviour}",
                        *(*model, *dtypes, *_SETTINGS, f"actor.routing_replay={replay}", f"behaviour_logprobs={behaviour}"),
                        *(f"actor.updates_per_step={updates}", "rollout.servers=0", f"rollout.endpoints=[{endpoint}]"),
                    )
                    for behaviour, updates in (("trainer", 4), ("engine", 1))
                }
                print(f"| {' | '.join((short, f'`{replay}`', *_row(lines['trainer'], lines['engine'])))} |", flush=True)
    print()
    _print_cost(folder)


def _row(of_trainer: list[dict[str, Any]], of_engine: list[dict[str, Any]]) -> list[str]:
    """Numbers of one row; "-" where nothing is replayed."""
    sampled = of_trainer[:3]
    gap = sum(line["engine_logprob_gap/mean"] for line in sampled) / 3
    differing = [line.get("routing/scored_differing") for line in sampled]
    now = of_trainer[4].get("routing/differing")
    return [
        "-" if differing[0] is None else f"{sum(differing) / 3:.2%}",
        f"{gap:.1e}",
        f"{of_engine[2]['prefix_min/mean']:.4f}",
        "-" if now is None else f"{now:.2%}",
        *(f"{line['prefix_min/mean']:.4f}" for line in of_trainer[2:]),
    ]


def _train(folder: Path, name: str, *settings: str) -> list[dict[str, Any]]:
    """One run: its five lines of metrics."""
    _minpro("train", f"output_dir={folder}", f"name={name}", *settings)
    return [dict(line) for line in read_metrics(folder / name / METRICS_FILE)]


def _minpro(command: str, *arguments: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "megatron_minpro.cli", command, _CONFIG, *arguments], cwd=_ROOT, check=True, stdout=subprocess.DEVNULL
    )


@contextmanager
def _server(folder: Path, settings: list[str]) -> Iterator[str]:
    command = [
        sys.executable,
        "-m",
        "megatron_minpro.cli",
        "serve",
        _CONFIG,
        *settings,
        "actor.routing_replay=server",
        "--folder",
        str(folder),
    ]
    with subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.DEVNULL) as process:
        try:
            path = folder / "endpoints.json"
            while not path.exists():
                if process.poll() is not None:
                    raise subprocess.CalledProcessError(process.returncode, command)
                time.sleep(0.2)
            [endpoint] = json.loads(path.read_text())
            yield endpoint
        finally:
            process.send_signal(signal.SIGINT)


def _print_cost(folder: Path, *, tokens: int = 4096, layers: int = 48, experts: int = 128, top_k: int = 8) -> None:
    """Of one long response of Qwen3-30B-A3B's shape, from the HTTP answer to the file, in one thread."""
    recipe = load_config(_ROOT / _CONFIG, []).model.warm_up
    assert recipe is not None
    shape = {"vocab_size": 24, "num_hidden_layers": layers, "num_experts": experts, "num_experts_per_tok": top_k}
    appender = RoutingAppender(folder / "cost", Architecture.from_config({**recipe.architecture, **shape}, source="benchmark"), step=0)
    drawn = np.random.default_rng(0).random((tokens, layers, experts), dtype=np.float32)
    ids = np.argsort(drawn, -1)[..., :top_k].astype("<i4").tobytes()
    text = base64.b64encode(ids).decode()
    answer = json.dumps([{"meta_info": {"routed_experts": text}}])
    million = 1e6 / tokens
    steps: dict[str, Callable[[], object]] = {
        "JSON": lambda: json.loads(answer),
        "base64": lambda: base64.b64decode(text, validate=True),
        "check and write": lambda: appender.keep(ids, num_inputs=tokens),
    }
    seconds = {name: _cpu_s(step) * million for name, step in steps.items()}
    print(
        f"A million positions of {layers} layers and {top_k} of {experts} experts: {len(answer) * million / 1e9:.2f} GB of text, ", end=""
    )
    print(f"{layers * top_k / 1e3:.2f} GB in the file; ", ", ".join(f"{name} {spent:.1f} s" for name, spent in seconds.items()), sep="")


def _cpu_s(step: Callable[[], object], *, times: int = 5) -> float:
    """Of the fastest of several calls."""
    spent = []
    for _ in range(times):
        began = time.process_time()
        step()
        spent.append(time.process_time() - began)
    return min(spent)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
