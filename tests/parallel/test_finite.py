"""A NaN in a log-prob: replaced at once, read off the device when the pass is over."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.finite import FiniteWatch
from parallel.layout import ParallelLayout
from parallel.packing import MicroBatch, build_micro_batch
from parallel.token_sequence import TokenSequence

LENGTHS = (3, 5, 4)
INDICES = (2, 0)


class Reads(TorchDispatchMode):
    """Operators that read a number, or a length, off a tensor: on CUDA the host waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def micro_batch(one_rank_group: dist.ProcessGroup) -> MicroBatch:
    sequences = [
        TokenSequence(token_ids=torch.arange(n + 1), loss_mask=torch.arange(n) > 0, streams={"advantages": torch.ones(n)}) for n in LENGTHS
    ]
    return build_micro_batch(sequences, INDICES, ParallelLayout(world_size=1), cp_group=one_rank_group, device=torch.device("cpu"))


def test_the_first_wrong_token_of_the_pass_is_named(one_rank_group: dist.ProcessGroup, micro_batch: MicroBatch) -> None:
    watch = FiniteWatch(rank=7, control_group=one_rank_group)
    # Sequence 2 with positions 0 to 3, then sequence 0 with 0 to 2; position 0 of each is masked.
    fine = torch.tensor([float("nan"), -1, -2, -3, float("inf"), -4, -5])
    wrong = torch.tensor([-1, -1, -2, -3, -1, float("-inf"), float("nan")], requires_grad=True)
    with Reads() as reads:
        assert torch.equal(watch.screen(fine, micro_batch).nan_to_num(nan=9.0, posinf=9.0), torch.tensor([9.0, -1, -2, -3, 9, -4, -5]))
        screened = watch.screen(wrong, micro_batch)
    assert reads.names == []
    assert screened.tolist() == [-1, -1, -2, -3, -1, 0, 0]
    screened.sum().backward()
    assert wrong.grad.tolist() == [1, 1, 1, 1, 1, 0, 0]
    with pytest.raises(
        FloatingPointError,
        match=r"^log-prob is -inf in sequence 0, position 1, on rank 7 \(2 such tokens in one micro-batch there\); nothing is scored$",
    ):
        watch.raise_together("nothing is scored")


def test_a_row_of_log_probs_is_wrong_where_one_of_them_is(one_rank_group: dist.ProcessGroup, micro_batch: MicroBatch) -> None:
    watch = FiniteWatch(rank=7, control_group=one_rank_group)
    rows = torch.full((7, 3), -1.0)
    rows[0, 1] = rows[5, 2] = float("nan")  # position 0 of sequence 2 is masked, the other one is position 1 of sequence 0
    screened = watch.screen(rows, micro_batch)
    assert screened[5].tolist() == [0, 0, 0] and screened[6].tolist() == [-1, -1, -1] and screened[0].isnan().any()
    with pytest.raises(FloatingPointError, match=r"^log-prob is nan in sequence 0, position 1, on rank 7 \(1 such tokens in"):
        watch.raise_together("nothing is scored")


def test_a_pass_without_a_wrong_token_goes_on(one_rank_group: dist.ProcessGroup, micro_batch: MicroBatch) -> None:
    watch = FiniteWatch(rank=0, control_group=one_rank_group)
    watch.raise_together("no micro-batch was on this rank")
    masked = replace(micro_batch, loss_mask_T=torch.zeros_like(micro_batch.loss_mask_T))
    watch.screen(torch.full((7,), float("nan")), masked)
    watch.raise_together("nothing is wrong where nothing is trained")
