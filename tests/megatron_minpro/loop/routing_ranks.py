"""Run by rank_pool.py for test_routing_ranks.py: batches are scored, wait and are trained by a real actor, on one layout after the other.
Their scores are centred; the most likely tokens are invented.

Arguments: MODEL OUT, with OUT/requests.json: [{name, port, layout, replay}]. Leaves OUT/<name>/numbers.json and rows.
"""

import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from checkpoints_convert.hf_config import read_architecture
from checkpoints_convert.safetensors_io import SafetensorsReader
from megatron_minpro.batch.sample import RolloutBatch, Sample
from megatron_minpro.batch.staleness import StalenessBuffer
from megatron_minpro.batch.top_tokens_file import TopTokensAppender
from megatron_minpro.loop.counters import RunCounters
from megatron_minpro.loop.scoring import score
from megatron_minpro.loop.training_run import TrainingRun
from megatron_minpro.loop.update import make_loss_function, update
from megatron_minpro.objectives import make_objective
from megatron_minpro.tracking.token_records import TokenRecords, read_token_records, write_token_records
from parallel import process_groups
from parallel.actor import ActorSettings, MegatronActor
from parallel.capabilities import detect
from parallel.layout import ParallelLayout
from parallel.top_tokens import TopTokens
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


def with_top_tokens(batch: RolloutBatch, run_dir: Path) -> RolloutBatch:
    """Collective. Each token's four likeliest: random ids with 0.4, 0.2, 0.1 and 0.05."""
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        file = TopTokensAppender(run_dir, top_k=4, vocab_size=96, step=batch.sampled_at_step)
        generator = np.random.default_rng(batch.sampled_at_step)
        places = []
        for sample in batch.samples:
            ids = np.stack([generator.permutation(96)[:4] for _ in range(sample.num_response_tokens)]).astype(np.int32)
            places.append(file.keep(ids, np.log(np.tile(np.array([0.4, 0.2, 0.1, 0.05], dtype=np.float32), (len(ids), 1)))))
        box = [file.close(places)]
    dist.broadcast_object_list(box)
    return replace(batch, top_tokens=box[0])


def grad_norms(actor: MegatronActor) -> dict[str, float]:
    """As if every sampled token had been certain. Centred REINFORCE has nothing to learn then; a wide ceiling truncates nothing."""
    sequences = []
    for sequence in [sample.training_sequence() for sample in batch_of(0).scored_by_engine().samples]:
        sampled = sequence.token_ids[1:][sequence.loss_mask].int()
        ids = torch.stack([(sampled + 1) % 96, sampled], 1)
        sequences.append(replace(sequence, top=TopTokens(ids=ids, logprobs=torch.tensor([-60.0, 0.0]).repeat(len(ids), 1))))
    objectives = {"reinforce": make_objective("reinforce"), "wide": make_objective("cispo", clip_high=1e6)}
    return {
        name: actor.update(sequences, make_loss_function(objective), learning_rate=0.0).grad_norm for name, objective in objectives.items()
    }


def written(path: Path) -> dict[str, Any]:
    """What a file of token records holds, in JSON's types."""
    records = asdict(read_token_records(path))
    return {**records, "streams": {name: values.tolist() for name, values in records["streams"].items()}}


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
            "tracking.token_groups=2",
        )
        first = dist.get_rank() == 0
        if first:
            run_dir.mkdir()
        actor = build(folder, layout, groups)
        tokens: list[TokenRecords] = []
        run = TrainingRun(
            config=config,
            actor=actor,
            objective=make_objective("minpro", clip_high=0.1),
            buffer=StalenessBuffer(1),
            counters=RunCounters(),
            driver=SimpleNamespace(heartbeat=lambda phase: None, keep_tokens=tokens.append) if first else None,  # type: ignore[arg-type]
            control_group=groups.control,
            stop_requested=lambda: False,
            checkpoints=FakeCheckpoints([], lambda: 0),
        )
        metrics: dict[str, float] = {}
        for step in (0, 1):
            run.buffer.push(step, score(run, with_top_tokens(batch_of(step), run_dir), run.timer(), metrics))
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
        norms = grad_norms(actor)
        dist.barrier()
        if first:
            kept = {
                "grad_norms": norms,
                "files": files,
                "rows": [[each.tolist() for each in batch] for batch in rows],
                "scored": [logprobs.tolist() for logprobs in scored],
                "trained": trained,
                "left": sorted(path.name for folder in ("routing", "top_tokens") for path in run_dir.glob(f"{folder}/*")),
                "counters": asdict(run.counters),
                "tokens": [written(write_token_records(run_dir, records)) for records in tokens],
            }
            (run_dir / "numbers.json").write_text(json.dumps(kept))
        process_groups.shut_down()


if __name__ == "__main__":
    main()
