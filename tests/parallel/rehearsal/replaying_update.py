"""An update with routing replay: a plug-in for RehearsalRequest.update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from megatron_minpro.loop.rehearsed_update import update
from parallel.actor import MegatronActor
from parallel.token_sequence import TokenSequence


class Recorded:
    """Rows of experts by sequence, counted."""

    def __init__(self) -> None:
        self.rows = 0

    def write(self, index: int, layer: int, position: int, rows: torch.Tensor) -> None:
        assert not rows.is_cuda and rows.dtype == torch.uint8
        self.rows += len(rows)


def record_and_replay(actor: MegatronActor, sequences: Sequence[TokenSequence], *, learning_rate: float, replay: bool) -> None:
    """A scoring pass that records, one that replays, and an update; without replay the same passes with the router's own choice."""
    layers, per_token = actor.architecture.num_hidden_layers, actor.architecture.num_experts_per_tok
    assert per_token is not None
    recorded = Recorded()
    actor.logprobs(sequences, record=recorded if replay else None)
    if replay:
        assert recorded.rows > 0
        rows = torch.arange(per_token, dtype=torch.uint8)
        sequences = [replace(sequence, experts=rows.expand(layers, sequence.num_positions, per_token)) for sequence in sequences]
    actor.logprobs(sequences)
    update(actor, sequences, learning_rate=learning_rate, name="minpro", options={"clip_low": 1.0, "clip_high": 4.0})
