"""What the local layers hold and let go, operation by operation: the code of parallel/layers and Megatron-Core's around it, in bytes.

A pass through a layer is written down once. `graph`: autograd keeps what the backward pass reads. Sizes in remarks are of tensors in the
activations' dtype; `parallel/rehearsal` measures the same and is what this file is held against.
"""

from __future__ import annotations

from dataclasses import dataclass

from parallel.planner.tape import Tape

ACTIVATIONS, RECOMPUTED, LOGITS = "activations", "recomputed", "logits"
DISPATCH, CONTEXT, TEMPORARY = "dispatch", "context", "temporary"

EXPONENTIALS = 8192  # vocabulary entries, in parallel/logprobs.py; rows of a weight gradient that are added at a time, too


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalLayer:
    """Bytes of one layer's tensors for one micro-batch on one rank.

    part: where what the graph keeps is counted, "activations" or, while a layer is recomputed, "recomputed".
    """

    element: int
    own: float  # [own tokens, H]: this rank's tokens under sequence parallelism
    all: float  # [tokens, H], gathered over tensor-parallel ranks
    query: float  # [tokens, query width]
    key: float  # [tokens, key-value width]
    heads: float  # one fp32 number per head and token
    sequence_parallel: bool
    cp: int
    varlen: bool  # attention without masks
    grouped: bool  # experts in one product, on stacked weights
    keeps_core: bool  # the graph keeps attention's rotated queries and keys; selective recomputation does not
    is_moe: bool
    routing: float  # expert numbers, weights and maps that the graph keeps
    sent: float  # [own tokens * experts per token, H]
    arrived: float  # after the all-to-all between expert-parallel ranks
    routed: float  # [rows of this rank's experts, H]
    hidden: float  # [rows, 2F], or [tokens, 2F] of a dense layer
    first_weight: float  # of this rank's experts together; weight gradients of other layers are added in place
    second_weight: float
    travels: bool  # tokens are sorted for a dispatcher: Megatron's alltoall
    exchanged: bool  # ep > 1
    gathered: bool  # etp > 1

    @property
    def attention_keys(self) -> float:
        """Keys, or values, of the pieces that this rank's zigzag chunks read."""
        return self.key * (2 * self.cp + 1) / 2 if self.cp > 1 else self.key

    @property
    def grids(self) -> float:
        """Queries, keys and values laid side by side, and the output, where attention runs in grids."""
        return 0.0 if self.varlen or not self.keeps_core else 2 * self.query + 2 * self.cp * self.key

    def forward(self, tape: Tape, *, graph: bool, part: str = ACTIVATIONS) -> None:
        """From the layer's input, which the caller holds under ACTIVATIONS, to its output, which is held there in addition."""
        self._attention_forward(tape, graph=graph, part=part)
        self.norm_forward(tape, self.own, part)
        if self.is_moe:
            self._moe_forward(tape, graph=graph, part=part)
        else:
            self._dense_forward(tape, graph=graph, part=part)
        tape.hold(ACTIVATIONS, self.own)  # residual: the layer's output
        tape.drop(TEMPORARY, self.own)
        if not graph:
            tape.drop(part, 2 * self.own)  # the second norm's output, the first residual

    def norm_forward(self, tape: Tape, size: float, part: str) -> None:
        """Its output is held under `part`."""
        wide = self._wide(size)
        tape.hold(TEMPORARY, wide)
        tape.hold(TEMPORARY, wide)
        tape.hold(part, size)
        tape.drop(TEMPORARY, 2 * wide)

    def norm_backward(self, tape: Tape, size: float) -> None:
        """Holds the gradient of the norm's input; its output's gradient is the caller's to drop."""
        wide = 4 / self.element * size
        copies = 0.0 if self.element == 4 else wide  # fp32 is not copied to fp32
        tape.hold(TEMPORARY, copies)
        tape.hold(TEMPORARY, copies)
        tape.hold(TEMPORARY, wide)
        tape.drop(TEMPORARY, copies)
        tape.hold(TEMPORARY, wide)
        tape.hold(TEMPORARY, self._wide(size))
        tape.hold(TEMPORARY, size)
        tape.drop(TEMPORARY, copies + 2 * wide + self._wide(size))

    def _wide(self, size: float) -> float:
        """A copy in fp32, where there is one."""
        return 0.0 if self.element == 4 else 2 * size

    def _attention_forward(self, tape: Tape, *, graph: bool, part: str) -> None:
        qkv = self.query + 2 * self.key
        self.norm_forward(tape, self.own, part)
        tape.hold(part, qkv)
        tape.hold(part, self.query)  # queries alone
        self.norm_forward(tape, self.query, TEMPORARY)
        if not graph:
            tape.drop(part, self.query)
        self.norm_forward(tape, self.key, TEMPORARY)
        self._core_forward(tape, graph=graph, part=part)
        tape.hold(TEMPORARY, self.all)  # the projection's output
        if self.sequence_parallel:
            tape.hold(TEMPORARY, self.own)
            tape.drop(TEMPORARY, self.all)
        if not graph or self.keeps_core:
            tape.drop(TEMPORARY, self.query + self.key)  # normed
        else:
            tape.drop(TEMPORARY, self.query + self.key)
            tape.hold(part, self.query + self.key)
        if not graph:
            tape.drop(part, qkv + self.query + self.heads)
        tape.hold(part, self.own)  # residual
        tape.drop(TEMPORARY, self.own)
        if not graph:
            tape.drop(part, self.own)

    def _core_forward(self, tape: Tape, *, graph: bool, part: str) -> None:
        """From normed queries and keys to attention's output, held under `part` with a number per head."""
        kept = graph and self.keeps_core
        tape.hold(TEMPORARY, self.query)
        tape.hold(TEMPORARY, self.key)
        rotated = self.query + self.key
        if self.cp > 1:
            tape.hold(CONTEXT, 2 * self.key)
            tape.hold(CONTEXT, 2 * self.cp * self.key)
            tape.drop(CONTEXT, 2 * self.key)
            tape.drop(TEMPORARY, self.key)
            rotated = self.query
            if self.varlen:
                tape.hold(CONTEXT, 2 * self.attention_keys)
        tape.hold(part, self.query + self.heads)
        if self.cp > 1:
            gathered = 2 * self.cp * self.key
            chosen = 2 * self.attention_keys if self.varlen else 0.0
            tape.drop(CONTEXT, gathered + chosen)
            if kept:
                tape.hold(part, chosen if self.varlen else gathered)
        tape.drop(TEMPORARY, rotated)
        if kept:
            tape.hold(part, rotated + self.grids)

    def _moe_forward(self, tape: Tape, *, graph: bool, part: str) -> None:
        if graph:
            tape.hold(part, self.routing)
        if not self.travels:
            tape.hold(part, self.sent)
            self._experts_forward(tape, graph=graph, part=part)
            tape.hold(TEMPORARY, self.own)
            tape.drop(DISPATCH, self.routed)
            if not graph:
                tape.drop(part, self.sent)
            return
        tape.hold(DISPATCH, self.sent)
        exchanged = self.arrived if self.exchanged else 0.0
        tape.hold(DISPATCH, exchanged)
        gathered = self.routed if self.gathered else 0.0
        tape.hold(DISPATCH, gathered)
        tape.hold(part, self.routed)  # sorted by expert
        tape.drop(DISPATCH, gathered)
        self._experts_forward(tape, graph=graph, part=part)
        tape.hold(DISPATCH, self.routed)  # sorted back
        if self.gathered:
            tape.hold(DISPATCH, self.arrived)
        if not graph:
            tape.drop(part, self.routed)
        tape.drop(DISPATCH, self.routed)  # the experts' output
        if self.gathered:
            tape.drop(DISPATCH, self.routed)
        back = self.arrived if self.gathered else self.routed
        if self.exchanged:
            tape.hold(DISPATCH, self.sent)
            tape.drop(DISPATCH, back)
            back = self.sent
        tape.hold(TEMPORARY, self.own)
        tape.drop(DISPATCH, back + self.sent + exchanged)

    def _experts_forward(self, tape: Tape, *, graph: bool, part: str) -> None:
        """The output is held under DISPATCH."""
        stacked = (self.first_weight, self.second_weight) if self.grouped else (0.0, 0.0)
        tape.hold(TEMPORARY, stacked[0])
        tape.hold(part, self.hidden)
        tape.drop(TEMPORARY, stacked[0])
        tape.hold(part, self.hidden / 2)
        tape.hold(TEMPORARY, stacked[1])
        tape.hold(DISPATCH, self.routed)
        tape.drop(TEMPORARY, stacked[1])
        if not graph:
            tape.drop(part, 1.5 * self.hidden)

    def _dense_forward(self, tape: Tape, *, graph: bool, part: str) -> None:
        tape.hold(part, 2.5 * self.hidden)  # both halves; SiLU, the other half, their product
        if not graph:
            tape.drop(part, self.hidden)
        tape.hold(TEMPORARY, self.all)
        if not graph:
            tape.drop(part, 1.5 * self.hidden)
        if self.sequence_parallel:
            tape.hold(TEMPORARY, self.own)
            tape.drop(TEMPORARY, self.all)

    def backward(self, tape: Tape, *, part: str = ACTIVATIONS) -> None:
        """After a forward pass with a graph. The output's gradient is held under TEMPORARY by the caller, the input's is in its place."""
        if self.is_moe:
            self._moe_backward(tape, part=part)
        else:
            self._dense_backward(tape, part=part)
        self.norm_backward(tape, self.own)
        tape.drop(TEMPORARY, self.own)  # of the norm's output
        tape.drop(part, self.own)  # the first residual
        tape.flash(TEMPORARY, self.own)  # both gradients and their sum
        tape.drop(TEMPORARY, self.own)
        self._attention_backward(tape, part=part)
        self.norm_backward(tape, self.own)
        tape.drop(TEMPORARY, self.own)
        tape.flash(TEMPORARY, self.own)
        tape.drop(TEMPORARY, self.own)

    def _attention_backward(self, tape: Tape, *, part: str) -> None:
        """Holds the gradient of the first norm's output in addition."""
        if self.sequence_parallel:
            tape.hold(TEMPORARY, self.all)
        tape.hold(TEMPORARY, self.query)
        if self.sequence_parallel:
            tape.drop(TEMPORARY, self.all)
        if not self.keeps_core:
            self._recompute_core(tape, part=part)
        self._core_backward(tape, part=part)
        self.norm_backward(tape, self.key)
        tape.drop(TEMPORARY, self.key if self.cp == 1 else 0.0)
        qkv = self.query + 2 * self.key
        tape.drop(part, qkv)
        self.norm_backward(tape, self.query)
        tape.drop(TEMPORARY, self.query)
        tape.drop(part, self.query)
        tape.hold(TEMPORARY, qkv)
        tape.drop(TEMPORARY, self.query + self.key + (self.key if self.cp == 1 else 2 * self.key))
        tape.hold(TEMPORARY, self.all)
        if self.sequence_parallel:
            tape.hold(TEMPORARY, self.own)
            tape.drop(TEMPORARY, self.all)
        tape.drop(TEMPORARY, qkv)
        tape.drop(part, self.own)  # the first norm's output

    def _recompute_core(self, tape: Tape, *, part: str) -> None:
        """Once more, with a graph of its own; its output is the one that was kept."""
        tape.hold(part, self.query)
        tape.hold(part, self.key)
        if self.cp > 1:
            tape.drop(part, self.key)
            tape.hold(CONTEXT, 2 * self.key)
            tape.hold(CONTEXT, 2 * self.cp * self.key)
            tape.drop(CONTEXT, 2 * self.key)
            tape.hold(part, 2 * self.attention_keys if self.varlen else 0.0)
        tape.flash(part, self.query + self.heads)
        if self.cp > 1:
            tape.drop(CONTEXT, 2 * self.cp * self.key)
            tape.hold(part, 0.0 if self.varlen else 2 * self.cp * self.key)
        tape.drop(part, self.query + self.key)  # the normed ones

    def _core_backward(self, tape: Tape, *, part: str) -> None:
        """From the output's gradient (query) to those of normed queries and keys, and of values."""
        if self.cp == 1:
            tape.hold(TEMPORARY, self.query + 2 * self.key)
            tape.drop(TEMPORARY, self.query)
            tape.drop(part, 2 * self.query + self.key + self.heads + self.grids)
            tape.flash(TEMPORARY, self.key)
            tape.flash(TEMPORARY, self.query)
            return
        keys = self.attention_keys if self.varlen else self.cp * self.key
        kept = 2 * self.attention_keys if self.varlen else 2 * self.cp * self.key
        tape.hold(TEMPORARY, self.query + 2 * keys)
        tape.drop(TEMPORARY, self.query)
        tape.drop(part, 2 * self.query + kept + self.heads + self.grids)
        whole = self.cp * self.key
        for _ in range(2):
            tape.hold(TEMPORARY, whole)
            tape.flash(TEMPORARY, whole)
            tape.drop(TEMPORARY, keys)
        tape.hold(TEMPORARY, 2 * whole)
        tape.drop(TEMPORARY, 2 * whole)
        tape.hold(TEMPORARY, 2 * self.key)
        tape.drop(TEMPORARY, 2 * whole)
        tape.flash(TEMPORARY, self.key)
        tape.flash(TEMPORARY, self.key + self.query)

    def _moe_backward(self, tape: Tape, *, part: str) -> None:
        """Holds the gradient of the second norm's output in addition."""
        self._return_gradients(tape)
        first, second = (self.first_weight, self.second_weight) if self.grouped else (0.0, 0.0)
        half = self.hidden / 2
        tape.hold(TEMPORARY, second)
        tape.hold(TEMPORARY, half)
        tape.drop(TEMPORARY, second)
        tape.hold(TEMPORARY, self.second_weight)
        tape.drop(DISPATCH, self.routed)
        tape.drop(part, half)
        tape.drop(TEMPORARY, self.second_weight)
        tape.hold(TEMPORARY, self.hidden)
        tape.flash(TEMPORARY, half)
        tape.drop(TEMPORARY, half)
        tape.drop(part, self.hidden)
        tape.hold(TEMPORARY, first)
        tape.hold(DISPATCH, self.routed)
        tape.drop(TEMPORARY, first)
        tape.hold(TEMPORARY, self.first_weight)
        tape.drop(TEMPORARY, self.hidden)
        tape.drop(part, self.routed)
        tape.drop(TEMPORARY, self.first_weight)
        back = self.routed
        if self.travels:
            tape.hold(DISPATCH, self.routed)
            tape.drop(DISPATCH, self.routed)
            if self.gathered:
                tape.hold(DISPATCH, self.arrived)
                tape.drop(DISPATCH, back)
                back = self.arrived
            if self.exchanged:
                tape.hold(DISPATCH, self.sent)
                tape.drop(DISPATCH, back)
                back = self.sent
        tape.hold(TEMPORARY, self.own)
        tape.flash(TEMPORARY, self.own)
        tape.drop(DISPATCH, back)
        tape.hold(TEMPORARY, self.own)  # of the router
        tape.drop(part, self.own + self.routing)  # the second norm's output
        tape.hold(TEMPORARY, self.own)
        tape.drop(TEMPORARY, 2 * self.own)

    def _return_gradients(self, tape: Tape) -> None:
        """The way of the output's gradient to the experts."""
        tape.hold(DISPATCH, self.sent)
        if not self.travels:
            return
        held = self.sent
        if self.exchanged:
            tape.hold(DISPATCH, self.arrived)
            tape.drop(DISPATCH, held)
            held = self.arrived
        if self.gathered:
            tape.hold(DISPATCH, self.routed)
            tape.drop(DISPATCH, held)
            held = self.routed
        tape.hold(DISPATCH, self.routed)
        tape.drop(DISPATCH, held)

    def _dense_backward(self, tape: Tape, *, part: str) -> None:
        """Holds the gradient of the second norm's output in addition."""
        half = self.hidden / 2
        if self.sequence_parallel:
            tape.hold(TEMPORARY, self.all)
        tape.hold(TEMPORARY, half)
        if self.sequence_parallel:
            tape.drop(TEMPORARY, self.all)
        tape.drop(part, half)  # the product
        tape.hold(TEMPORARY, 2 * half)
        tape.drop(TEMPORARY, half)
        tape.drop(part, 2 * half)
        tape.hold(TEMPORARY, half)
        tape.drop(TEMPORARY, half)
        tape.drop(part, self.hidden)
        tape.hold(TEMPORARY, self.hidden)
        tape.drop(TEMPORARY, 2 * half)
        tape.hold(TEMPORARY, self.all)
        if self.sequence_parallel:
            tape.hold(TEMPORARY, self.own)
            tape.drop(TEMPORARY, self.all)
        tape.drop(TEMPORARY, self.hidden)
        tape.drop(part, self.own)
