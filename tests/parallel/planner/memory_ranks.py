"""Run from test_memory.py: real actors on 1 to 8 gloo ranks say what their parameters, gradients, optimizer and activations occupy.

python memory_ranks.py OUT.json '[{"name": ..., "layout": {...}, "config": {...}, "dtype": ..., "recompute": ..., "lengths": [...]}, ...]'

Imports once; the ranks of every case are forked from this process. OUT.json holds, for every case, a list with one record per rank.
"""

import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from checkpoints_convert.dtypes import DTYPES
from checkpoints_convert.hf_config import Architecture
from parallel import process_groups
from parallel.actor import ActorSettings, MegatronActor
from parallel.capabilities import detect
from parallel.layout import ParallelLayout
from parallel.optimizer import inner_optimizers
from parallel.optimizer_settings import OptimizerSettings
from parallel.token_sequence import TokenSequence
from rollout.ports import free_ports

CHUNK_TOKENS = 64


def saved_tensors(output: Tensor) -> Iterator[Tensor]:
    """Every tensor that the graph behind `output` keeps for its backward pass."""
    waiting, seen = [output.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
        if hasattr(node, "saved_tensors"):
            found = list(node.saved_tensors)
        else:
            found = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        for value in found:
            for tensor in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(tensor, Tensor):
                    yield tensor


def measure(case: dict) -> dict:
    layout = ParallelLayout(**case["layout"])
    groups = process_groups.initialize(layout, backend="gloo", seed=0, timeout_s=60)
    settings = ActorSettings(
        dtype=DTYPES[case["dtype"]],
        recompute=case["recompute"],
        max_tokens_per_micro_batch=sum(case["lengths"]) + 64,
        logprob_chunk_tokens=CHUNK_TOKENS,
        temperature=1.0,
        optimizer=OptimizerSettings(weight_decay=0.0, betas=(0.9, 0.99), eps=1e-8, gradient_clip=1.0),
        megatron_options={},
    )
    architecture = Architecture.from_config(case["config"], source="case")
    actor = MegatronActor(architecture, layout, groups, detect(), settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in actor._local.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in actor._local.values()}
    kept: dict[int, int] = {}

    def keep(output: Tensor) -> None:
        for tensor in saved_tensors(output):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters and storage.nbytes():
                kept[storage.data_ptr()] = storage.nbytes()

    for chunk in actor._chunks:
        chunk.register_forward_hook(lambda module, arguments, output: keep(output))

    def loss(*, logprobs_T: torch.Tensor, loss_mask_T: torch.Tensor, global_tokens: int, **unused: object) -> tuple[torch.Tensor, dict]:
        result = -torch.where(loss_mask_T, logprobs_T, 0.0).sum() / global_tokens
        keep(result)
        return result, {}

    sequences = [
        TokenSequence(
            token_ids=torch.randint(0, architecture.vocab_size, (length + 1,), generator=generator),
            loss_mask=torch.ones(length, dtype=torch.bool),
            streams={},
        )
        for length in case["lengths"]
        for _ in range(layout.dp)
    ]
    actor.update(sequences, loss, learning_rate=1e-3)
    buffers = [buffer for chunk in actor._chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    optimizers = inner_optimizers(actor._optimizer)
    state = [tensor for each in optimizers for values in each.optimizer.state.values() for tensor in values.values()]
    master = [p for each in optimizers for group in each.optimizer.param_groups for p in group["params"]]
    record = {
        "parameters": sum(parameter.numel() for parameter in actor._local.values()),
        "parameter_bytes": sum(_bytes(buffer.param_data) for buffer in buffers),
        "gradient_bytes": sum(_bytes(buffer.grad_data) for buffer in buffers),
        # In fp32 the master is a view of the parameters themselves.
        "optimizer_bytes": sum(map(_bytes, state)) + (sum(map(_bytes, master)) if settings.dtype == torch.bfloat16 else 0),
        "activation_bytes": sum(kept.values()),
    }
    process_groups.shut_down()
    return record


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def rank_main(rank: int, port: int, case: dict, folder: str) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(case["layout"]["world_size"])
    )
    torch.set_num_threads(1)
    Path(folder, str(rank)).write_text(json.dumps(measure(case)))


def main() -> None:
    cases, results = json.loads(sys.argv[2]), {}
    context = multiprocessing.get_context("fork")
    for case in cases:
        port, size = free_ports("127.0.0.1", 1)[0], case["layout"]["world_size"]
        with tempfile.TemporaryDirectory() as folder:
            ranks = [context.Process(target=rank_main, args=(rank, port, case, folder)) for rank in range(size)]
            for process in ranks:
                process.start()
            for process in ranks:
                process.join()
            if any(process.exitcode for process in ranks):
                sys.exit(f"{case['name']}: a rank failed")
            results[case["name"]] = [json.loads(Path(folder, str(rank)).read_text()) for rank in range(size)]
    Path(sys.argv[1]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
