"""`make bench-main`: a global step of the tiny job against TRL's GRPOTrainer. Prints a table, writes JSON and Markdown.

Both train the same base model on the same prompts, as many responses and updates, in fp32, on the same two cores. TRL generates with
transformers in its own process, on two threads. We take a layout for two cores: at staleness 0 two servers, and two ranks where the model
is large enough, which work in turn; at staleness 2 one rank and one server, which work at the same time. The runs take turns, so that a
slow minute meets all of them. Rewards differ, lengths do not: TRL's objective is GRPO, and its rate has no warm-up.

python tests/benchmarks/against_trl.py --trl .venv-trl/bin/python --out runs/benchmarks [--only small]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rows import Row, table
from tiny_job import CONFIG, ROOT, Trained, median, train

from checkpoints_convert.policy_folder import load_tokenizer
from megatron_minpro.config import load_config
from megatron_minpro.data.sources import load_prompts
from megatron_minpro.tracking.versions import machine_facts

ROUNDS = 3
THREADS = 2
_PHASES = ("sample", "score", "update", "sync")


@dataclass(frozen=True, kw_only=True)
class Way:
    """How we run. target: the largest ratio of our step to TRL's that is good enough."""

    staleness: int
    settings: tuple[str, ...]
    target: float


@dataclass(frozen=True, kw_only=True)
class Size:
    """A job. steps: global steps that are measured. A run has more: the first warms up, and some only sample or only train."""

    steps: int
    settings: tuple[str, ...] = ()
    ways: Mapping[str, Way]


_ONE_EACH = ("world_size=1", "parallel.ep=1", "rollout.servers=1")
_TWO_SERVERS = ("world_size=1", "parallel.ep=1", "rollout.servers=2")  # two ranks take longer: an update is short (26 ms)
_TWO_EACH = ("world_size=2", "parallel.ep=1", "rollout.servers=2")
SIZES = {
    "small": Size(
        steps=8,
        ways={
            "in turn": Way(staleness=0, settings=_TWO_SERVERS, target=1.2),
            "at once": Way(staleness=2, settings=_ONE_EACH, target=0.9),
        },
    ),
    # Arithmetic dominates: 4 layers of 256, 32 experts, responses of some 200 tokens.
    "large": Size(
        steps=2,
        settings=(
            "model.warm_up.architecture.num_hidden_layers=4",
            "model.warm_up.architecture.hidden_size=256",
            "model.warm_up.architecture.intermediate_size=512",
            "model.warm_up.architecture.moe_intermediate_size=128",
            "model.warm_up.architecture.head_dim=64",
            "model.warm_up.architecture.num_experts=32",
            "model.warm_up.architecture.initializer_range=0.06",
            "model.warm_up.architecture.max_position_embeddings=512",
            "model.warm_up.num_steps=60",
            "model.warm_up.batch_size=16",
            "prompts.options.num_operations=33",
            "prompts.max_prompt_tokens=96",
            "rollout.max_new_tokens=208",
            "rollout.prompts_per_step=16",
            "actor.updates_per_step=8",
        ),
        ways={
            "in turn": Way(staleness=0, settings=_TWO_EACH, target=1.0),
            "at once": Way(staleness=2, settings=_ONE_EACH, target=1.0),
        },
    ),
}


def rows(name: str, folder: Path, trl: Path) -> list[Row]:
    """The rows of one size. folder: an existing folder; the runs stay there until the next call. trl: TRL's interpreter."""
    size = SIZES[name]
    base = folder / "against_trl" / name
    shutil.rmtree(base, ignore_errors=True)
    ours: dict[str, list[Trained]] = {way: [] for way in size.ways}
    theirs: list[list[dict[str, float]]] = []
    for turn in range(ROUNDS):
        for label, way in size.ways.items():
            steps = size.steps + 2 + way.staleness
            run = f"{label.replace(' ', '_')}_{turn}"
            ours[label].append(train(base, run, steps=steps, staleness=way.staleness, settings=(*size.settings, *way.settings)))
        theirs.append(_train_trl(base, size, trl)[1:-1])
    steps_of_trl = [step for run in theirs for step in run]
    trl_s = {phase: statistics.median(step[phase] for step in steps_of_trl) for phase in steps_of_trl[0]}
    peer = (
        f"TRL: {trl_s['cpu']:.2f} CPU s; generate {trl_s['generate']:.2f}, score {trl_s['score']:.2f}, update {trl_s['update']:.2f} s; "
        f"{trl_s['response_tokens']:.0f} tokens a response, reward {trl_s['reward']:.2f}"
    )
    return [
        Row(
            name=f"global step, {name}, staleness {way.staleness}, {label}: {_said(ours[label])}",
            seconds=median(ours[label], "time/step"),
            peer=peer,
            peer_seconds=trl_s["step"],
            target=way.target,
        )
        for label, way in size.ways.items()
    ]


def _said(runs: list[Trained]) -> str:
    phases = ", ".join(f"{phase} {median(runs, f'time/{phase}'):.2f}" for phase in _PHASES)
    return (
        f"{statistics.median(run.cpu_s for run in runs):.2f} CPU s; {phases} s; "
        f"{median(runs, 'rollout/length'):.0f} tokens a response, reward {median(runs, 'reward/sampled'):.2f}"
    )


def _train_trl(base: Path, size: Size, trl: Path) -> list[dict[str, float]]:
    """What each global step of one run took. The base model is there."""
    config = load_config(ROOT / CONFIG, [*size.settings, f"model.path={base / 'base_model'}"])
    steps = size.steps + 2
    prompts = load_prompts(
        tokenizer=load_tokenizer(base / "base_model"),
        source=config.prompts.source,
        options=config.prompts.options,
        max_prompt_tokens=config.prompts.max_prompt_tokens,
    )[0]
    job = {
        "model": str(base / "base_model"),
        "prompts": [_prompt(prompts[index]) for index in range(steps * config.rollout.prompts_per_step)],
        "steps": steps,
        "prompts_per_step": config.rollout.prompts_per_step,
        "group_size": config.rollout.group_size,
        "updates_per_step": config.actor.updates_per_step,
        "max_new_tokens": config.rollout.max_new_tokens,
        "learning_rate": config.actor.optimizer.learning_rate,
        "threads": THREADS,
        "folder": str(base / "trl"),
    }
    asked, answered = base / "trl_job.json", base / "trl_result.json"
    asked.write_text(json.dumps(job))
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "OMP_NUM_THREADS")}
    subprocess.run(
        [trl, Path(__file__).with_name("trl_process.py"), asked, answered],
        cwd=base,
        env={**environment, "OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    found: list[dict[str, float]] = json.loads(answered.read_text())
    return found


def _prompt(prompt: Any) -> dict[str, Any]:
    return {"text": prompt.text, "token_ids": list(prompt.token_ids), "answer": prompt.answer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", type=Path, required=True, help="the interpreter of TRL's environment")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="gets main.json and main.md")
    parser.add_argument("--only", choices=sorted(SIZES), help="one size")
    arguments = parser.parse_args()
    out: Path = arguments.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    found = [row for name in SIZES if arguments.only in (None, name) for row in rows(name, out, arguments.trl.absolute())]
    machine = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine_facts()["cpu"], "cores": os.cpu_count()}
    numbers = [{**vars(row), "ratio": row.ratio} for row in found]
    (out / "main.json").write_text(json.dumps({**machine, "rows": numbers}, indent=2) + "\n")
    (out / "main.md").write_text(table(found))
    print(table(found))


if __name__ == "__main__":
    main()
