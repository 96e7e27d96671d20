"""A wrong shape or dtype at a public tensor function is caught while the tests run."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import TypeCheckError

from megatron_minpro.objectives.advantages import mean_only
from megatron_minpro.objectives.ratios import ratio
from parallel.logprobs import token_logprobs
from parallel.prefix_scan import PrefixMin
from parallel.sequence_shard import SequenceShard
from parallel.token_sequence import TokenSequence

MASK_3 = torch.ones(3, dtype=torch.bool)


def logprobs_of(hidden: torch.Tensor, labels: torch.Tensor) -> None:
    token_logprobs(hidden, torch.zeros(8, 4), labels, vocab_size=8, temperature=1.0, tp_group=None, chunk_tokens=2, with_entropy=False)


@pytest.mark.parametrize(
    ("wrong_call", "argument"),
    [
        (lambda: PrefixMin(torch.zeros(4), MASK_3), "mask_T"),
        (lambda: PrefixMin(torch.zeros(3), MASK_3.float()), "mask_T"),
        (lambda: SequenceShard.whole([3]).assemble(torch.zeros(3, 1)), "x_T"),
        (lambda: logprobs_of(torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64)), "labels"),
        (lambda: logprobs_of(torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64)), "weight_VH"),
        (lambda: TokenSequence(token_ids=torch.arange(4), loss_mask=MASK_3[:2], streams={}), "loss_mask"),
        (lambda: TokenSequence(token_ids=torch.arange(4), loss_mask=MASK_3, streams={"advantages": torch.zeros(4)}), "streams"),
        (lambda: mean_only(torch.zeros(2, 3), torch.zeros(3, 2, dtype=torch.int64)), "group_ids"),
        (lambda: ratio(torch.zeros(3, 1)), "log_ratio_T"),
    ],
)
def test_a_wrong_shape_names_its_argument(wrong_call, argument: str) -> None:
    with pytest.raises(TypeCheckError, match=f"parameter '{argument}'"):
        wrong_call()


def test_right_shapes_pass() -> None:
    logprobs_of(torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64))
    assert mean_only(torch.tensor([[1.0, 3.0]])).tolist() == [[-1.0, 1.0]]
