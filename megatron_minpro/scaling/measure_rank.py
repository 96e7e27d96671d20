"""One rank: `torchrun ... -m megatron_minpro.scaling.measure_rank FOLDER REQUEST MODEL RESULT`.

REQUEST is JSON: {"task": "measure", "layout": ..., "sequences": 32} or {"task": "route", "layout": ..., "texts": a file of token ids}.
RESULT, a JSON file, is what rank 0 found, or what the first rank to fail has to say (see `failure`).
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from checkpoints_convert.atomic_files import write_atomically
from megatron_minpro.config import RunConfig
from megatron_minpro.loop.rehearsed_update import with_entropies
from megatron_minpro.loop.update import train_mini_batch
from megatron_minpro.objectives import make_objective
from megatron_minpro.run.worker import build_actor
from megatron_minpro.scaling.batch import synthetic_sequences
from megatron_minpro.scaling.routing import counts_of_sequence
from megatron_minpro.scaling.study import Routing, Settings, read_study
from parallel import process_groups
from parallel.actor import MegatronActor
from parallel.capabilities import detect
from parallel.expert_load import dispatched, load_of, record_routing
from parallel.exposed_communication import PIPELINE, kinds_of_groups, measure_waiting
from parallel.layout import ParallelLayout
from parallel.memory_watch import peak_rss_bytes, reset_peak_rss
from parallel.packing import break_even_tokens, plan_replicas
from parallel.process_groups import ProcessGroups
from parallel.token_sequence import TokenSequence
from rollout.processes import die_with_parent

_EXPLAINED_STEPS = 2  # after the window: their routing and waiting are recorded, which costs time of its own
_TIMEOUT_S = 600.0


def measure(config: RunConfig, settings: Settings, layout: ParallelLayout, sequences: int, model: Path, groups: ProcessGroups) -> Any:
    """What rows.measured takes, on rank 0; None on the others."""
    on_cuda = detect().device_type == "cuda"
    reset_peak_rss()
    before = peak_rss_bytes()
    actor = _build(config, layout, model, groups, routing=settings.routing)
    batch = synthetic_sequences(
        count=sequences,
        positions=settings.mean_tokens,
        prompt_tokens=min(config.prompts.max_prompt_tokens, settings.mean_tokens - 1),
        vocab_size=actor.architecture.vocab_size,
        seed=config.seed,
        top_k=config.objective.num_top_tokens,
    )
    objective = make_objective(config.objective.name, **config.objective.options)
    trained = with_entropies(batch, objective)

    def step() -> None:
        train_mini_batch(actor, trained, objective, lag=0, learning_rate=config.actor.optimizer.learning_rate)

    for _ in range(settings.warm_up):
        step()
    _reset_peaks(on_cuda)
    seconds = [_timed(step, on_cuda) for _ in range(settings.steps)]
    memory = _peaks(on_cuda) | {"rss_before_gb": 1e-9 * before}
    explained = _explain(step, on_cuda)
    everybody: list[Any] = [None] * layout.world_size
    dist.all_gather_object(everybody, {"seconds": seconds, "memory": memory, **explained}, group=groups.control)
    if groups.coordinates.rank != 0:
        return None
    lengths = [sequence.num_positions for sequence in batch]
    budget, break_even = config.actor.max_tokens_per_micro_batch, break_even_tokens(actor.architecture)
    count = len(plan_replicas(lengths, layout, max_tokens=budget, break_even=break_even)[0])
    return summarize(everybody, layout, micro_batches=count)


def summarize(everybody: list[dict[str, Any]], layout: ParallelLayout, *, micro_batches: int) -> dict[str, Any]:
    """From every rank's findings, in rank order: the slowest rank of each step, the fullest rank's memory, mean waiting, summed loads."""
    found: dict[str, Any] = {
        "step_s": [max(each) for each in zip(*(rank["seconds"] for rank in everybody), strict=True)],
        "micro_batches": micro_batches,
        "cores": os.cpu_count(),
    }
    for name in everybody[0]["memory"]:
        values = [rank["memory"][name] for rank in everybody]
        found[name] = None if None in values else max(values)
    if everybody[0]["waiting"] is not None:
        kinds = sorted({kind for rank in everybody for kind in rank["waiting"]})
        found["exposed_s"] = {kind: sum(rank["waiting"].get(kind, 0.0) for rank in everybody) / len(everybody) for kind in kinds}
        found["explained_s"] = sum(rank["explained_s"] for rank in everybody) / len(everybody)
        found["bubble"] = found["exposed_s"].get(PIPELINE, 0.0) / found["explained_s"]
    if layout.pp == 1:
        found["bubble"] = 0.0
    dispatches = dispatched({rank: each["routed"] for rank, each in enumerate(everybody)}, layout)
    if dispatches:
        load = load_of(dispatches, ep=layout.ep)
        found |= {"expert_load_max": load.expert_max, "expert_load_mean": load.expert_mean, "rank_imbalance": load.rank_imbalance}
    return found


def route(config: RunConfig, layout: ParallelLayout, texts: Path, model: Path, groups: ProcessGroups) -> Any:
    """What the routers choose for each text: {"counts": [N, L, E], "lengths": tokens that were looked at} on rank 0; None on the others.

    Every replica works on the same text, cut so that nothing is padded.
    """
    actor = _build(config, layout, model, groups, routing="real")
    counts, lengths = [], []
    for token_ids in json.loads(texts.read_text(encoding="utf-8")):
        positions = (len(token_ids) - 1) // layout.sequence_multiple * layout.sequence_multiple
        sequence = TokenSequence(
            token_ids=torch.tensor(token_ids[: positions + 1]), loss_mask=torch.ones(positions, dtype=torch.bool), streams={}
        )
        with record_routing() as routed:
            actor.logprobs([sequence] * layout.dp)
        everybody: list[Any] = [None] * layout.world_size
        dist.all_gather_object(everybody, routed, group=groups.control)
        counts.append(counts_of_sequence(everybody, copies=layout.dp).tolist())
        lengths.append(positions)
    return {"counts": counts, "lengths": lengths} if groups.coordinates.rank == 0 else None


def _build(config: RunConfig, layout: ParallelLayout, model: Path, groups: ProcessGroups, *, routing: Routing) -> MegatronActor:
    options = dict(config.megatron)
    if routing == "forced":
        options["moe_router_force_load_balancing"] = True
    parallel = config.parallel.model_copy(update={"ep": layout.ep, "dp": None})
    here = config.model_copy(update={"world_size": layout.world_size, "parallel": parallel, "megatron": options})
    return build_actor(here, model, groups, optimizer=config.actor.optimizer, temperature=config.rollout.temperature)


def _explain(step: Callable[[], None], on_cuda: bool) -> dict[str, Any]:
    """Routing and, where collectives block the host, waiting per step."""
    with record_routing() as routed:
        if on_cuda:
            step()
            return {"routed": routed, "waiting": None, "explained_s": None}
        kinds = kinds_of_groups()
        waited: dict[str, float] = {}

        def watched() -> None:
            with measure_waiting(kinds) as waiting:
                step()
            for kind, seconds in waiting.items():
                waited[kind] = waited.get(kind, 0.0) + seconds / _EXPLAINED_STEPS

        seconds = [_timed(watched, on_cuda) for _ in range(_EXPLAINED_STEPS)]
    return {"routed": routed, "waiting": waited, "explained_s": sum(seconds) / _EXPLAINED_STEPS}


def _timed(step: Callable[[], None], on_cuda: bool) -> float:
    dist.barrier()
    if on_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if on_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _reset_peaks(on_cuda: bool) -> None:
    reset_peak_rss()
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()


def _peaks(on_cuda: bool) -> dict[str, float | None]:
    return {
        "peak_rss_gb": 1e-9 * peak_rss_bytes(),
        "peak_allocated_gb": 1e-9 * torch.cuda.max_memory_allocated() if on_cuda else None,
        "peak_reserved_gb": 1e-9 * torch.cuda.max_memory_reserved() if on_cuda else None,
    }


def main(arguments: list[str]) -> None:
    """Entry point of every rank."""
    die_with_parent(parent_pid=os.getppid())
    folder, request, model, result = Path(arguments[0]), json.loads(arguments[1]), Path(arguments[2]), Path(arguments[3])
    config, settings = read_study(folder)
    layout = ParallelLayout(**request["layout"])
    capabilities = detect()
    if capabilities.device_type == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    try:
        groups = process_groups.initialize(layout, backend=capabilities.backend, seed=config.seed, timeout_s=_TIMEOUT_S)
        if request["task"] == "measure":
            found = measure(config, settings, layout, request["sequences"], model, groups)
        else:
            found = route(config, layout, Path(request["texts"]), model, groups)
        if found is not None:
            write_atomically(result, json.dumps(found))
        dist.barrier()
        process_groups.shut_down()
    except Exception as error:
        traceback.print_exc()
        if not result.exists():  # the first rank to fail is the one that knows why
            write_atomically(result, json.dumps(failure(error, rank=int(os.environ["RANK"]))))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # the others may wait in a collective for this one; torchrun ends them


def failure(error: Exception, *, rank: int) -> dict[str, str]:
    """What the row will say: out_of_memory, or failed."""
    text = " ".join(str(error).split())
    ran_out = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text
    return {"status": "out_of_memory" if ran_out else "failed", "reason": f"rank {rank}: {type(error).__name__}: {text}"}


if __name__ == "__main__":
    main(sys.argv[1:])
