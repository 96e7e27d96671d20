"""The routing-imbalance study: how unevenly a checkpoint's routers load the experts on real text, and what that costs at each ep.

Shapes: N sequences, L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from checkpoints_convert.policy_folder import load_tokenizer
from megatron_minpro.config import RunConfig
from megatron_minpro.data.prompts import encode_prompts
from megatron_minpro.data.sources import load_prompts
from megatron_minpro.scaling.study import Case
from megatron_minpro.tracking.json_lines import read_json_lines
from parallel.expert_load import RoutedTokens, load_of
from parallel.layout import ParallelLayout
from parallel.planner.hardware import Hardware
from parallel.planner.plan import Work, make_plan
from parallel.planner.shape import ModelShape
from parallel.planner.training import Training


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingCost:
    """One layout. rank_imbalance: busiest expert-parallel rank over the mean, of one micro-batch and layer, averaged over tokens.

    dispatch_tokens: that meet in one dispatch. balanced_s, step_s: the planner's optimizer step without and with the imbalance.
    """

    world_size: int
    ep: int
    sequences: int
    dispatch_tokens: int
    rank_imbalance: float
    balanced_s: float
    step_s: float

    @property
    def slowdown(self) -> float:
        return self.step_s / self.balanced_s


def real_sequences(config: RunConfig, *, count: int) -> tuple[list[tuple[int, ...]], str]:
    """Token ids of up to `count` real texts, and what they are: the run's kept responses after their prompts, else prompts alone."""
    tokenizer = load_tokenizer(Path(config.model.path))
    files = sorted((config.run_dir / "rollouts").glob("step_*.jsonl"))
    if files:
        records = list(islice((record for path in reversed(files) for _, record in read_json_lines(path)), count))
        prompts = encode_prompts(tokenizer, [record["prompt"] for record in records])
        answers = tokenizer([record["response"] for record in records], add_special_tokens=False)["input_ids"]
        what = f"prompts and responses in {config.run_dir / 'rollouts'}"
        return [(*prompt, *answer) for prompt, answer in zip(prompts, answers, strict=True)], what
    source, _ = load_prompts(tokenizer=tokenizer, **config.prompts.model_dump())
    return [source[index].token_ids for index in range(min(count, len(source)))], f"prompts of {config.prompts.source}"


def counts_of_sequence(by_rank: Sequence[Sequence[RoutedTokens]], *, copies: int) -> Tensor:
    """Choices of one sequence's tokens by layer and expert, int64 [L, E]. by_rank: of every rank; copies: replicas that worked on it."""
    layers: dict[int, Tensor] = {}
    for routed in by_rank:
        for layer, tokens_E in routed:
            layers[layer] = layers.get(layer, torch.zeros_like(tokens_E)) + tokens_E
    return torch.stack([layers[layer] for layer in sorted(layers)]) // copies


def routing_costs(
    counts_NLE: Tensor,
    lengths: Sequence[int],
    cases: Sequence[Case],
    shape: ModelShape,
    training: Training,
    hardware: Hardware,
    work: Work,
) -> list[RoutingCost]:
    """What the measured choices mean for every case that can be run. counts_NLE: of `counts_of_sequence`; lengths: tokens of each."""
    found = []
    for case in cases:
        if case.layout is None or case.problem is not None:
            continue
        tokens = dispatch_tokens(case.layout, work.micro_batch_tokens)
        gathered = gather(counts_NLE, lengths, tokens=tokens)
        imbalance = load_of([counts_E for counts_LE in gathered for counts_E in counts_LE], ep=case.ep).rank_imbalance
        balanced, uneven = (
            make_plan(shape, case.layout, replace(training, imbalance=value), hardware, replace(work, sequences=case.sequences)).time.step_s
            for value in (1.0, imbalance)
        )
        met = round(sum(int(counts_LE[0].sum()) for counts_LE in gathered) / len(gathered) / shape.top_k)
        found.append(
            RoutingCost(
                world_size=case.world_size,
                ep=case.ep,
                sequences=case.sequences,
                dispatch_tokens=met,
                rank_imbalance=imbalance,
                balanced_s=balanced,
                step_s=uneven,
            )
        )
    return found


def dispatch_tokens(layout: ParallelLayout, micro_batch_tokens: int) -> int:
    """Tokens whose copies meet in one dispatch: full micro-batches of all replicas that share experts."""
    replicas = max(1, layout.ep * layout.etp // (layout.tp * layout.cp))
    return replicas * micro_batch_tokens


def gather(counts_NLE: Tensor, lengths: Sequence[int], *, tokens: int) -> list[Tensor]:
    """Consecutive sequences added up until the next would exceed `tokens`: [L, E] each; what is left over after full ones is dropped."""
    found, start, filled = [], 0, 0
    for index, length in enumerate(lengths):
        if index > start and filled + length > tokens:
            found.append(counts_NLE[start:index].sum(0))
            start, filled = index, 0
        filled += length
    return found or [counts_NLE.sum(0)]
