"""What `minpro plan` may assume about training beside the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from megatron_minpro.option import Option


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingChoice:
    """Fields of parallel.planner.training.Training; None: as the configuration says, or as Training's users do today."""

    precision: Annotated[str | None, Option("bf16, fp8, mxfp8 or fp32; default: the config's")] = None
    dispatcher: Annotated[str | None, Option("alltoall, deepep or hybridep; default: the config's")] = None
    overlap: Annotated[
        bool | None,
        Option("hide dispatch behind another micro-batch; default: the config's", flags=("--overlap/--no-overlap",)),
    ] = None
    recompute: Annotated[str | None, Option("none, selective or full; default: actor.recompute")] = None
    spec: Annotated[
        str | None, Option("fused: TransformerEngine's; local: this project's own. Default: fused on GPUs", flags=("--layers",))
    ] = None
    cuda_graphs: Annotated[str | None, Option("none, partial (per layer) or full (iteration); default: none")] = None
    fp8_attention: Annotated[
        bool | None, Option("precision of attention's core; default: bf16", flags=("--fp8-attention/--bf16-attention",))
    ] = None
    fsdp: Annotated[bool, Option("parameters and gradients sharded over replicas too")] = False
    imbalance: Annotated[float, Option("tokens of the busiest expert-parallel rank over the mean", minimum=1.0)] = 1.0
    release: Annotated[float, Option("of the training stack, year.month; older ones launch more kernels", minimum=24.0)] = 26.06
