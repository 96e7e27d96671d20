"""Run by rank_pool.py for test_routing_ranks.py: batches are scored, wait and are trained by a real actor, on one layout after the other.

Arguments: MODEL OUT, with OUT/requests.json: [{name, port, layout, replay}]. Leaves OUT/<name>/numbers.json and rows.
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from checkpoints_convert.hf_config import read_architecture
from checkpoints_convert.safetensors_io import SafetensorsReader
from megatron_minpro.batch.sample import RolloutBatch, Sample
from megatron_minpro.batch.staleness import StalenessBuffer
from megatron_minpro.loop.counters import RunCounters
from megatron_minpro.loop.scoring import score
from megatron_minpro.loop.training_run import TrainingRun
from megatron_minpro.loop.update import update
from megatron_minpro.objectives import make_objective
from parallel import process_groups
from parallel.actor import ActorSettings, MegatronActor
from parallel.capabilities import detect
from parallel.layout import ParallelLayout
from rollout.records import VersionSpan
from tests.megatron_minpro.loop.diary import UPDATES, FakeCheckpoints, small_config


def build(folder: Path, layout: ParallelLayout, groups: process_groups.ProcessGroups) -> MegatronActor:
    config = small_config()
    settings = ActorSettings(
        dtype=torch.float32,
        recompute="full",
        max_tokens_per_micro_batch=32,
        logprob_chunk_tokens=32,
        temperature=1.0,
        optimizer=config.actor.optimizer,
        megatron_options={},
    )
    actor = MegatronActor(read_architecture(folder), layout, groups, detect(), settings)
    with SafetensorsReader(folder) as reader:
        actor.load_hugging_face(reader.read)
    return actor


def batch_of(step: int) -> RolloutBatch:
    """Random tokens, the same on every rank."""
    generator = torch.Generator().manual_seed(step)
    samples = []
    for number in range(8):
        length = 9 + 2 * number
        samples.append(
            Sample(
                sample_id=f"step{step}-{number}",
                token_ids=torch.randint(0, 96, (length,), generator=generator, dtype=torch.int32),
                loss_mask=torch.arange(length) >= 3,
                engine_logprobs=torch.full((length - 3,), -4.0),
                behaviour_logprobs=None,
                version_spans=(VersionSpan(policy_version=0, start=0, end=length - 3),),
                finish_reason="stop",
                reward=1.0,
                correct=True,
                advantage=float(torch.randn((), generator=generator)),
            )
        )
    return RolloutBatch(sampled_at_step=step, policy_version=0, group_size=2, samples=tuple(samples))


def main() -> None:
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    for request in json.loads((out / "requests.json").read_text()):
        os.environ["MASTER_PORT"] = str(request["port"])
        layout = ParallelLayout(**request["layout"])
        groups = process_groups.initialize(layout, backend="gloo", seed=0, timeout_s=90)
        run_dir = out / request["name"]
        config = small_config(
            f"output_dir={out}",
            f"name={request['name']}",
            "schedule=serial",
            "staleness=1",
            "actor.optimizer.learning_rate=0.03",
            f"actor.routing_replay={request['replay']}",
        )
        first = dist.get_rank() == 0
        if first:
            run_dir.mkdir()
        actor = build(folder, layout, groups)
        run = TrainingRun(
            config=config,
            actor=actor,
            objective=make_objective("minpro"),
            buffer=StalenessBuffer(1),
            counters=RunCounters(),
            driver=SimpleNamespace(heartbeat=lambda phase: None) if first else None,  # type: ignore[arg-type]
            control_group=groups.control,
            stop_requested=lambda: False,
            checkpoints=FakeCheckpoints([], lambda: 0),
        )
        metrics: dict[str, float] = {}
        for step in (0, 1):
            run.buffer.push(step, score(run, batch_of(step), run.timer(), metrics))
        files = sorted(path.name for path in run_dir.glob("routing/*"))
        waiting = run.buffer.waiting()
        lengths = [[len(sample.token_ids) - 1 for sample in batch.samples] for batch in waiting]
        rows = [b.routing.rows(run_dir / "routing", each) for b, each in zip(waiting, lengths, strict=True) if b.routing is not None]
        scored = [sample.behaviour_logprobs for batch in waiting for sample in batch.samples if sample.behaviour_logprobs is not None]
        trained = []
        for step in (1, 2):
            under_way = run.begin_step(step, run.timer())
            update(run, under_way)
            trained.append(under_way.metrics)
        assert run.actor.policy_version == 2 * UPDATES
        dist.barrier()
        if first:
            kept = {
                "files": files,
                "rows": [[each.tolist() for each in batch] for batch in rows],
                "scored": [logprobs.tolist() for logprobs in scored],
                "trained": trained,
                "left": sorted(path.name for path in run_dir.glob("routing/*")),
                "counters": asdict(run.counters),
            }
            (run_dir / "numbers.json").write_text(json.dumps(kept))
        process_groups.shut_down()


if __name__ == "__main__":
    main()
