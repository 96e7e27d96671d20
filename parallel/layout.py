"""ParallelLayout: how many ranks share a tensor, a sequence, an expert, a layer range; what is legal, and why not.

Rank order is Megatron-Core's default, "tp-cp-ep-dp-pp": tensor-parallel neighbours are adjacent ranks, pipeline stages are
furthest apart. Expert layers regroup the same ranks of one pipeline stage as etp (fastest), ep, expert data parallel.
"""

from __future__ import annotations

from dataclasses import dataclass

from checkpoints_convert.hf_config import Architecture
from parallel.stages import Pipeline


@dataclass(frozen=True, slots=True, kw_only=True)
class RankCoordinates:
    """Where one rank sits on every axis of the layout."""

    rank: int
    tp: int
    cp: int
    dp: int
    pp: int
    etp: int
    ep: int
    edp: int


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"parallel: {message}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelLayout(Pipeline):
    """Sizes of every axis. Construction refuses what no model could run; `check_model` refuses what this model cannot.

    Raises ValueError naming the rule, before any process group exists.
    """

    world_size: int
    tp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    sequence_parallel: bool = False

    def __post_init__(self) -> None:
        for name in ("world_size", "tp", "pp", "cp", "ep", "etp"):
            value = getattr(self, name)
            _require(value >= 1, f"{name}={value} must be at least 1")
        dense = self.tp * self.pp * self.cp
        _require(
            self.world_size % dense == 0,
            f"world_size={self.world_size} is not a multiple of tp*pp*cp = {self.tp}*{self.pp}*{self.cp} = {dense}",
        )
        expert = self.ep * self.etp * self.pp
        _require(
            self.world_size % expert == 0,
            f"world_size={self.world_size} is not a multiple of ep*etp*pp = {self.ep}*{self.etp}*{self.pp} = {expert}",
        )
        _require(self.vpp is None or self.vpp >= 2, f"vpp={self.vpp} must be null or at least 2")
        _require(self.vpp is None or self.pp >= 2, f"vpp={self.vpp} needs pp >= 2, not pp={self.pp}")
        _require(not self.sequence_parallel or self.tp > 1, f"sequence_parallel=true needs tp > 1, not tp={self.tp}")
        if self.layers_per_stage is not None:
            object.__setattr__(self, "layers_per_stage", tuple(self.layers_per_stage))  # a list where it was read from JSON
        self.check_stages()

    @property
    def dp(self) -> int:
        """Replicas of the dense layers; each trains its own share of a mini-batch."""
        return self.world_size // (self.tp * self.pp * self.cp)

    @property
    def edp(self) -> int:
        """Replicas of each expert."""
        return self.world_size // (self.ep * self.etp * self.pp)

    @property
    def sequence_multiple(self) -> int:
        """Each packed sequence is padded to a multiple of this (zigzag context parallelism, sequence parallelism)."""
        return (2 * self.cp if self.cp > 1 else 1) * (self.tp if self.sequence_parallel else 1)

    @property
    def first_rank_of_last_stage(self) -> int:
        """A rank that holds the output layer and is first on every axis but pp."""
        return self.world_size - self.world_size // self.pp

    def check_model(self, architecture: Architecture) -> None:
        """Raise ValueError naming the first rule that this model breaks on this layout."""
        a = architecture
        self.chunks(a.num_hidden_layers)
        _require(a.num_attention_heads % self.tp == 0, f"tp={self.tp} does not divide {a.num_attention_heads} attention heads")
        _require(a.num_key_value_heads % self.tp == 0, f"tp={self.tp} does not divide {a.num_key_value_heads} key-value heads")
        _require(a.vocab_size % self.tp == 0, f"tp={self.tp} does not divide the vocabulary of {a.vocab_size}")
        _require(not self.sequence_parallel or a.hidden_size % self.tp == 0, f"tp={self.tp} does not divide hidden size {a.hidden_size}")
        if a.num_experts is None:
            _require(self.ep == 1, f"ep={self.ep} needs a mixture-of-experts model, this one is dense")
            _require(self.etp == 1, f"etp={self.etp} needs a mixture-of-experts model, this one is dense")
            _require(a.intermediate_size % self.tp == 0, f"tp={self.tp} does not divide intermediate size {a.intermediate_size}")
            return
        assert a.moe_intermediate_size is not None
        _require(a.num_experts % self.ep == 0, f"ep={self.ep} does not divide {a.num_experts} experts")
        _require(
            a.moe_intermediate_size % self.etp == 0, f"etp={self.etp} does not divide expert intermediate size {a.moe_intermediate_size}"
        )
        # Megatron-Core: the router's gradient is wrong otherwise, and it raises in training mode.
        _require(self.tp == 1 or self.sequence_parallel, f"tp={self.tp} with a mixture-of-experts model needs sequence_parallel=true")

    def coordinates(self, rank: int) -> RankCoordinates:
        """The place of `rank` (0 <= rank < world_size)."""
        _require(0 <= rank < self.world_size, f"rank={rank} is outside world_size={self.world_size}")
        tp, rest = rank % self.tp, rank // self.tp
        cp, rest = rest % self.cp, rest // self.cp
        dp, pp = rest % self.dp, rest // self.dp
        in_stage = rank % (self.world_size // self.pp)
        etp, rest = in_stage % self.etp, in_stage // self.etp
        ep, edp = rest % self.ep, rest // self.ep
        return RankCoordinates(rank=rank, tp=tp, cp=cp, dp=dp, pp=pp, etp=etp, ep=ep, edp=edp)
