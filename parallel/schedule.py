"""Megatron-Core's schedule of forward and backward passes, over packed micro-batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from parallel.layout import ParallelLayout
from parallel.mcore import DistributedDataParallel, get_forward_backward_func
from parallel.packing import MicroBatch
from parallel.stage_shapes import known_shapes


def run_micro_batches(
    chunks: Sequence[DistributedDataParallel],
    micro_batches: list[MicroBatch],
    finish: Callable[[MicroBatch, Tensor], tuple[Tensor, Tensor, None]],
    *,
    layout: ParallelLayout,
    stage: int,
    hidden_size: int,
    forward_only: bool,
) -> None:
    """Run every micro-batch through this rank's model chunks.

    Empties the list: a micro-batch that is done is let go, with what attention keeps of it.

    Args:
        chunks: this rank's model chunks.
        micro_batches: this rank's parts, in order; equally many on all ranks.
        finish: turns the last stage's hidden states into a loss, a count that Megatron ignores, and nothing.
        layout: of the run.
        stage: this rank's pipeline stage.
        hidden_size: of the model.
        forward_only: no backward pass.
    """
    tokens = [micro_batch.shard.num_local_tokens for micro_batch in micro_batches]
    iterators = [_drain(deque(micro_batches)) for _ in chunks]
    micro_batches.clear()

    def forward_step(batches: Iterator[MicroBatch], chunk: DistributedDataParallel, *_: Any) -> tuple[Tensor, Callable[..., Any]]:
        micro_batch = next(batches)
        hidden = chunk(
            input_ids=micro_batch.token_ids_T[None],
            position_ids=micro_batch.shard.position_T[None],
            attention_mask=None,
            packed_seq_params=micro_batch.packed_seq_params,
        )
        return hidden, lambda output: finish(micro_batch, output)

    with known_shapes(tokens, layout, stage=stage, hidden_size=hidden_size, forward_only=forward_only):
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if layout.vpp is not None else iterators[0],
            model=list(chunks) if layout.vpp is not None else chunks[0],
            num_microbatches=len(tokens),
            seq_length=max(tokens),
            micro_batch_size=1,
            forward_only=forward_only,
        )


def _drain(queue: deque[MicroBatch]) -> Iterator[MicroBatch]:
    while queue:
        yield queue.popleft()
