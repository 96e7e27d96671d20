"""Run by torchrun from test_actor.py: one actor on some layout scores and trains the sequences of a fixture and keeps what came out.

torchrun --nproc-per-node N actor_ranks.py FIXTURE_DIR OUT_DIR '{"ep": 2}'
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


def build(fixture: Path, layout: ParallelLayout, groups: process_groups.ProcessGroups, request: dict) -> MegatronActor:
    settings = ActorSettings(
        dtype=torch.float32,
        recompute=request.get("recompute", "none"),
        max_tokens_per_micro_batch=request.get("max_tokens", 64),
        logprob_chunk_tokens=16,
        temperature=request.get("temperature", 1.0),
        optimizer=OptimizerSettings(**request["optimizer"]),
        megatron_options=request.get("megatron", {}),
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


def main() -> None:
    fixture, out, request = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    torch.set_num_threads(1)
    layout = ParallelLayout(**request["layout"])
    groups = process_groups.initialize(layout, backend="gloo", seed=0, timeout_s=90)
    actor = build(fixture, layout, groups, request)
    sequences = read_sequences(fixture)
    results = {f"before.{name}": tensor for name, tensor in exported(actor).items()}
    results |= {f"logprobs.{i}": x.clone() for i, x in enumerate(actor.logprobs(sequences))}
    objective = make_objective(**request["objective"])
    loss_fn = make_loss_function(objective)
    rows = []
    for step in range(request["steps"]):
        if step == request.get("reload_before_step"):
            path = out / "actor"
            if groups.coordinates.rank == 0:
                path.mkdir()
            torch.distributed.barrier()
            actor.save(path)
            actor = build(fixture, layout, groups, request)
            actor.load(path, policy_version=step)
        report = actor.update(sequences, loss_fn, learning_rate=request["learning_rate"])
        rows.append(
            {
                "loss": report.loss,
                "grad_norm": report.grad_norm,
                "num_tokens": report.num_tokens,
                "policy_version": report.policy_version,
                "metrics": {name: value.tolist() for name, value in report.metrics.items()},
            }
        )
    results |= {f"after.{name}": tensor for name, tensor in exported(actor).items()}
    if groups.coordinates.rank == 0:
        save_file({name: tensor.contiguous() for name, tensor in results.items()}, out / "results.safetensors")
        (out / "reports.json").write_text(json.dumps(rows))
    process_groups.shut_down()


if __name__ == "__main__":  # Megatron's checkpoint writer starts processes that import this file again
    main()
