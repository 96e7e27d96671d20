"""What is to be rehearsed: one rank of one run, as data that travels as JSON into the process that rehearses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from checkpoints_convert.hf_config import Architecture
from parallel.layout import ParallelLayout
from parallel.optimizer_settings import OptimizerSettings

Phase = Literal["build", "load", "check", "keep", "score", "update", "capture", "export"]
PHASES: tuple[Phase, ...] = ("build", "load", "check", "keep", "score", "update", "capture", "export")


@dataclass(frozen=True, slots=True, kw_only=True)
class RehearsalRequest:
    """One rank of a run.

    model: the Hugging Face config. lengths: positions of the sequences of one mini-batch, over all replicas. prompt_tokens: how many of
    each are not trained. update: `package.module:function(actor, sequences, learning_rate=..., **update_options)` takes one optimizer
    step. kept_weights: where the sampling weights lie, None without them. top_tokens: of each trained token, for score centering.
    """

    model: Mapping[str, Any]
    model_name: str
    layout: ParallelLayout
    rank: int
    dtype: str
    recompute: str
    max_tokens_per_micro_batch: int
    logprob_chunk_tokens: int
    temperature: float
    optimizer: OptimizerSettings
    megatron_options: Mapping[str, Any]
    deterministic: bool
    kept_weights: Literal["device", "pinned_host"] | None
    lengths: tuple[int, ...]
    prompt_tokens: int
    update: str
    update_options: Mapping[str, Any]
    phases: tuple[Phase, ...] = PHASES
    top_tokens: int = 0

    @property
    def architecture(self) -> Architecture:
        """Raises ValueError naming the model and the key that is missing or wrong."""
        return Architecture.from_config(dict(self.model), source=self.model_name)

    def as_json(self) -> dict[str, Any]:
        """The counterpart of `from_json`."""
        return {
            **{name: getattr(self, name) for name in self.__slots__},
            "layout": asdict(self.layout),
            "optimizer": self.optimizer.model_dump(),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RehearsalRequest:
        """The counterpart of `as_json`."""
        return cls(
            **{
                **values,
                "layout": ParallelLayout(**values["layout"]),
                "optimizer": OptimizerSettings(**values["optimizer"]),
                "lengths": tuple(values["lengths"]),
                "phases": tuple(values["phases"]),
            }
        )
