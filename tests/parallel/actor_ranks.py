"""Run by torchrun from test_actor.py: actors on one layout score and train the sequences of a fixture and keep what came out.

torchrun --nproc-per-node N actor_ranks.py FIXTURE_DIR OUT_DIR '{"layout": {"world_size": 2, "ep": 2}, "runs": {"probe": {...}}}'

Each run starts with a fresh actor and leaves OUT_DIR/<run>/results.safetensors and reports.json. Keys of a run: optimizer, learning_rate,
steps, and, where wanted, load (a checkpoint of these actors to start from, with first_step steps behind it), save_to (an absent folder for
one, at the end), reload_before_step (save, build a new actor, load).
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from checkpoints_convert.hf_config import read_architecture
from checkpoints_convert.safetensors_io import SafetensorsReader
from megatron_minpro.objectives import make_objective
from megatron_minpro.trainer import make_loss_function
from parallel import process_groups
from parallel.actor import ActorSettings, MegatronActor
from parallel.capabilities import detect
from parallel.layout import ParallelLayout
from parallel.optimizer import OptimizerSettings
from parallel.packing import TokenSequence


def build(fixture: Path, layout: ParallelLayout, groups: process_groups.ProcessGroups, run: dict) -> MegatronActor:
    settings = ActorSettings(
        dtype=torch.float32,
        recompute=run.get("recompute", "none"),
        max_tokens_per_micro_batch=run.get("max_tokens", 48),
        logprob_chunk_tokens=16,
        temperature=run.get("temperature", 1.0),
        optimizer=OptimizerSettings(**run["optimizer"]),
        megatron_options=run.get("megatron", {}),
    )
    actor = MegatronActor(read_architecture(fixture), layout, groups, detect(), settings)
    with SafetensorsReader(fixture) as reader:
        actor.load_hugging_face(reader.read)
    return actor


def read_sequences(fixture: Path) -> list[TokenSequence]:
    tensors = load_file(fixture / "sequences.safetensors")
    count = sum(name.startswith("token_ids.") for name in tensors)
    return [
        TokenSequence(
            token_ids=tensors[f"token_ids.{i}"],
            loss_mask=tensors[f"loss_mask.{i}"],
            streams={name: tensors[f"{name}.{i}"] for name in ("behaviour_logprobs", "advantages")},
        )
        for i in range(count)
    ]


def exported(actor: MegatronActor) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone().contiguous() for name, tensor in actor.export_weights()}


def save_actor(actor: MegatronActor, path: Path, *, first: bool) -> None:
    if first:
        path.mkdir(parents=True)
    torch.distributed.barrier()
    actor.save(path)


def train(fixture: Path, out: Path, layout: ParallelLayout, groups: process_groups.ProcessGroups, run: dict) -> None:
    first = groups.coordinates.rank == 0
    actor = build(fixture, layout, groups, run)
    first_step = run.get("first_step", 0)
    if "load" in run:
        actor.load(Path(run["load"]), policy_version=first_step)
    sequences = read_sequences(fixture)
    results = {f"before.{name}": tensor for name, tensor in exported(actor).items()}
    results |= {f"logprobs.{i}": x.clone() for i, x in enumerate(actor.logprobs(sequences))}
    loss_fn = make_loss_function(make_objective("minpro"))
    reports = []
    for step in range(first_step, first_step + run["steps"]):
        if step == run.get("reload_before_step"):
            save_actor(actor, out / "actor", first=first)
            actor = build(fixture, layout, groups, run)
            actor.load(out / "actor", policy_version=step)
        report = actor.update(sequences, loss_fn, learning_rate=run["learning_rate"])
        reports.append(
            {
                "loss": report.loss,
                "grad_norm": report.grad_norm,
                "num_tokens": report.num_tokens,
                "policy_version": report.policy_version,
                "metrics": {name: value.tolist() for name, value in report.metrics.items()},
            }
        )
    results |= {f"after.{name}": tensor for name, tensor in exported(actor).items()}
    if "save_to" in run:
        save_actor(actor, Path(run["save_to"]), first=first)
    if first:
        out.mkdir(exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in results.items()}, out / "results.safetensors")
        (out / "reports.json").write_text(json.dumps(reports))


def main() -> None:
    fixture, out, request = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    torch.set_num_threads(1)
    layout = ParallelLayout(**request["layout"])
    groups = process_groups.initialize(layout, backend="gloo", seed=0, timeout_s=90)
    for name, run in request["runs"].items():
        train(fixture, out / name, layout, groups, run)
    process_groups.shut_down()


if __name__ == "__main__":  # Megatron's checkpoint writer starts processes that import this file again
    main()
