"""Every metric of a run: its name, its unit, what it means, how its parts become one number, and which file computes it.

A metric that is not declared here ends the run with an error. README.md beside this file is made from this table:

    python -m megatron_minpro.tracking.metrics_reference

A name is group/metric. `log_ratio/...` and `log_prefix_min/...` are natural logarithms; `ratio/...` and `prefix_min/...` are ratios.
A plug-in may log names of its own under `custom/`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

from megatron_minpro.registry import nearest

HEADLINE = "reward/trained"  # the curve of the MinPRO paper: reward of the batch that is trained
CUSTOM = "custom/"


class Combined(StrEnum):
    """How the parts of a metric become one number. The text is what the reference page says."""

    TOKEN_MEAN = "sums and token counts are added over ranks, micro-batches and updates; the value is sum / count"
    QUANTILE = "histogram counts are added over ranks, micro-batches and updates; the value is a quantile of the total"
    WEIGHT_SUMS = "sums of W and W^2 are added over ranks, micro-batches and updates; the value is that of the totals"
    DERIVED = "computed from other metrics of the same step"
    UPDATE_MEAN = "the same on all ranks; mean over the step's updates"
    UPDATE_MIN = "the same on all ranks; smallest of the step's updates"
    UPDATE_MAX = "the same on all ranks; largest of the step's updates"
    UPDATE_LAST = "the same on all ranks; value of the step's last update"
    BATCH_MEAN = "rank 0 sees the whole batch; mean over it"
    BATCH_MAX = "rank 0 sees the whole batch; largest value in it"
    BATCH_MIN = "rank 0 sees the whole batch; smallest value in it"
    BATCH_SUM = "rank 0 sees the whole batch; sum over it"
    RUN_TOTAL = "counted since the run began, earlier attempts included"
    NOW = "value at the end of the step"
    WALL = "wall time on rank 0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One row of the table."""

    name: str
    unit: str
    meaning: str  # metrics of one group that mean the same share a row of the reference page
    combined: Combined
    source: str  # the file that computes it


def _metric(name: str, unit: str, combined: Combined, source: str, meaning: str) -> Metric:
    return Metric(name=name, unit=unit, meaning=meaning, combined=combined, source=source)


def _quantiles(group: str, unit: str, source: str, meaning: str) -> list[Metric]:
    return [
        _metric(f"{group}/p{percent:02d}", unit, Combined.QUANTILE, source, f"{percent}% of the trained tokens lie below it: {meaning}")
        for percent in (1, 5, 25, 50, 75, 95, 99)
    ]


def _along_the_response(group: str, unit: str, meaning: str, *, quantiles: bool = False) -> list[Metric]:
    """Means by place and by share in the group; quantiles under the same names, in groups of their own."""
    found = _by_stretch(group, unit, Combined.TOKEN_MEAN, f"mean of {meaning}")
    for percent in (5, 50, 95) if quantiles else ():
        below = f"{percent}% of the trained tokens lie below it: {meaning}"
        found += _by_stretch(f"{group}_p{percent:02d}", unit, Combined.QUANTILE, below)
    return found


def _by_stretch(group: str, unit: str, combined: Combined, meaning: str) -> list[Metric]:
    doubling = [2**exponent for exponent in range(17)]
    places = ["token_1", *(f"tokens_{first}_{2 * first - 1}" for first in doubling[1:-1]), f"tokens_{doubling[-1]}_on"]
    shares = [f"share_{first}_{last}" for first, last in pairwise((0, 1, 2, 5, 10, 20, 50, 100))]
    return [
        _metric(f"{group}/{name}", unit, combined, _BY_PLACE, f"{meaning}; by {where}")
        for where, names in (("place in the response, from 1", places), ("share of the response, in percent", shares))
        for name in names
    ]


_SAMPLED = "loop/sampled_batch.py"
_SCORING = "loop/scoring.py"
_UPDATE = "loop/update.py"
_ROUTING = "loop/routing.py"
_FINISH = "loop/finish_step.py"
_OBJECTIVES = "objectives/metrics.py"
_BY_PLACE = "objectives/by_place.py"
_CORRECTIONS = "objectives/corrections.py"
_TOP_TOKENS = "batch/top_tokens_file.py"
_SERVERS = "rollout/reports.py"
_IDLE = "loop/idle.py"

METRICS: tuple[Metric, ...] = (
    _metric("reward/trained", "reward", Combined.BATCH_MEAN, _UPDATE, "mean reward of the batch trained in this step; the headline curve"),
    _metric(
        "reward/sampled",
        "reward",
        Combined.BATCH_MEAN,
        _SAMPLED,
        "mean reward of all responses sampled in this step, also of those that dynamic sampling drops",
    ),
    _metric("reward/correct", "fraction", Combined.BATCH_MEAN, _SAMPLED, "sampled responses that are judged correct"),
    _metric("reward/errors", "responses", Combined.BATCH_SUM, _SAMPLED, "sampled responses that could not be graded; they count as wrong"),
    _metric(
        "reward/zero_variance_groups",
        "fraction",
        Combined.BATCH_MEAN,
        _SAMPLED,
        "sampled groups whose rewards are all equal; they teach nothing",
    ),
    _metric("rollout/tokens", "tokens", Combined.BATCH_SUM, _SAMPLED, "response tokens sampled in this step"),
    _metric("rollout/length", "tokens", Combined.BATCH_MEAN, _SAMPLED, "length of a sampled response"),
    _metric("rollout/truncated", "fraction", Combined.BATCH_MEAN, _SAMPLED, "sampled responses cut at rollout.max_new_tokens"),
    _metric("rollout/rounds", "rounds", Combined.BATCH_SUM, _SAMPLED, "times that dynamic sampling asked for responses"),
    _metric(
        "rollout/equal_groups",
        "groups",
        Combined.BATCH_SUM,
        _SAMPLED,
        "equal groups that dynamic sampling had to keep in the batch",
    ),
    _metric("rollout/dropped", "responses", Combined.BATCH_SUM, _SAMPLED, "responses that dynamic sampling dropped in this step"),
    _metric("servers/used", "servers", Combined.BATCH_SUM, _SERVERS, "servers that gave at least one response"),
    _metric("servers/retries", "responses", Combined.BATCH_SUM, _SERVERS, "responses that were asked for again after a failure"),
    _metric("servers/silent", "servers", Combined.BATCH_SUM, _SERVERS, "servers that gave no answer when they were last looked at"),
    _metric("servers/restarts", "restarts", Combined.BATCH_SUM, "loop/driver.py", "servers that were started again since the last step"),
    _metric(
        "engine_logprob_gap/mean",
        "nats",
        Combined.BATCH_MEAN,
        _SCORING,
        "mean |server's log-prob - trainer's log-prob| of a sampled token under the same weights; rollout.max_logprob_gap is its limit",
    ),
    _metric("engine_logprob_gap/max", "nats", Combined.BATCH_MAX, _SCORING, "the largest such difference of one token"),
    _metric("correction/weight", "ratio", Combined.BATCH_MEAN, _CORRECTIONS, "weight of a sampled token, see corrections"),
    _metric("correction/truncated", "fraction", Combined.BATCH_MEAN, _CORRECTIONS, "sampled tokens whose weight truncated_is cut"),
    _metric("correction/masked", "fraction", Combined.BATCH_MEAN, _CORRECTIONS, "sampled tokens to which masked_is gave weight 0"),
    _metric("correction/rejected", "responses", Combined.BATCH_SUM, _CORRECTIONS, "sampled responses to which rejection gave weight 0"),
    _metric(
        "batch/lag_min",
        "updates",
        Combined.UPDATE_MIN,
        _UPDATE,
        "policy lag: optimizer steps between the weights that sampled the batch and the weights its first mini-batch met",
    ),
    _metric("batch/lag_max", "updates", Combined.UPDATE_MAX, _UPDATE, "the same for the batch's last mini-batch"),
    _metric("batch/sampled_at_step", "step", Combined.NOW, _UPDATE, "global step in which the batch trained now was sampled"),
    _metric("batch/tokens", "tokens", Combined.BATCH_SUM, _UPDATE, "response tokens trained in this step"),
    _metric("batch/waiting", "batches", Combined.NOW, _FINISH, "batches that are sampled and not trained yet"),
    _metric(
        "routing/differing",
        "fraction",
        Combined.BATCH_MEAN,
        _ROUTING,
        "under actor.routing_replay: (token, layer) pairs of the batch trained now whose router, as it is in the update, would choose "
        "another set of experts than the one that is replayed",
    ),
    _metric("routing/differing_lag_min", "fraction", Combined.BATCH_MEAN, _ROUTING, "the same in the first mini-batch, at batch/lag_min"),
    _metric("routing/differing_lag_max", "fraction", Combined.BATCH_MEAN, _ROUTING, "the same in the last mini-batch, at batch/lag_max"),
    _metric(
        "routing/scored_differing",
        "fraction",
        Combined.BATCH_MEAN,
        _ROUTING,
        "under actor.routing_replay: server: (token, layer) pairs of the batch sampled in this step whose router in the trainer, with the "
        "same weights, would choose another set of experts than the server did",
    ),
    _metric(
        "routing/scored_missing",
        "fraction",
        Combined.BATCH_MEAN,
        _ROUTING,
        "under actor.routing_replay: server: such pairs whose experts are not known, because the server computed the response in two parts",
    ),
    _metric(
        "routing/missing",
        "fraction",
        Combined.BATCH_MEAN,
        _ROUTING,
        "(token, layer) pairs of the batch trained now without a row of experts: their router chooses for itself",
    ),
    _metric("ratio/mean", "ratio", Combined.TOKEN_MEAN, _OBJECTIVES, "rho = pi_theta / pi_old of a trained token"),
    _metric("ratio/unit", "fraction", Combined.TOKEN_MEAN, _OBJECTIVES, "trained tokens with |log rho| <= 1e-5; 1 at a lag is an error"),
    _metric("log_ratio/mean", "nats", Combined.TOKEN_MEAN, _OBJECTIVES, "log rho"),
    _metric("log_ratio/mean_square", "nats^2", Combined.TOKEN_MEAN, _OBJECTIVES, "(log rho)^2"),
    *_quantiles("log_ratio", "nats", _OBJECTIVES, "log rho"),
    *_along_the_response("log_ratio", "nats", "log rho", quantiles=True),
    _metric(
        "prefix_min/mean",
        "ratio",
        Combined.TOKEN_MEAN,
        _OBJECTIVES,
        "smallest rho among the earlier tokens of the response; 1 for the first token",
    ),
    *_quantiles("log_prefix_min", "nats", _OBJECTIVES, "log of the smallest rho among the earlier tokens"),
    *_along_the_response("log_prefix_min", "nats", "log of the smallest rho among the earlier tokens", quantiles=True),
    _metric("weight/mean", "ratio", Combined.TOKEN_MEAN, _OBJECTIVES, "weight of a token's policy gradient"),
    _metric("weight/mean_square", "ratio^2", Combined.TOKEN_MEAN, _OBJECTIVES, "square of that weight"),
    _metric(
        "weight/effective_sample_size",
        "fraction",
        Combined.DERIVED,
        _OBJECTIVES,
        "mean^2 / mean_square: the share of tokens that would do as well with equal weights (Kish, 1965)",
    ),
    _metric("weight/vanished", "fraction", Combined.TOKEN_MEAN, _OBJECTIVES, "trained tokens with |weight| < 0.01, clipped ones included"),
    *(
        _metric(
            f"effective_sample_size/{level}",
            "fraction",
            Combined.WEIGHT_SUMS,
            "objectives/effective_sample_size.py",
            f"(sum W)^2 / (B sum W^2) over the B {items}: 1 where all W are equal, 1 / B where one outweighs all others",
        )
        for level, items in (
            ("token", "trained tokens, W = rho"),
            ("prefix", "trained tokens, W = product of rho up to and with the token"),
            ("sequence", "responses, W = product of all rho of the response"),
        )
    ),
    *_along_the_response("weight", "ratio", "weight of a token's policy gradient"),
    _metric("clip/hard", "fraction", Combined.TOKEN_MEAN, _OBJECTIVES, "trained tokens whose gradient a clip, gate or filter made 0"),
    _metric(
        "clip/hard_with_advantage",
        "fraction",
        Combined.TOKEN_MEAN,
        _OBJECTIVES,
        "the same share, among trained tokens whose advantage is not 0: the others have no gradient to lose",
    ),
    _metric("clip/soft", "fraction", Combined.TOKEN_MEAN, _OBJECTIVES, "trained tokens whose weight was bounded but not made 0"),
    _metric(
        "centering/active",
        "fraction",
        Combined.TOKEN_MEAN,
        _OBJECTIVES,
        "under objective.score_centering: trained tokens at which something is subtracted, because the weight truncates a token there",
    ),
    _metric(
        "centering/drift",
        "probability",
        Combined.TOKEN_MEAN,
        _OBJECTIVES,
        "what is subtracted at a trained token: sum over the vocabulary of its |gradient with respect to a logit|, for an advantage of 1",
    ),
    _metric(
        "centering/top_mass",
        "probability",
        Combined.BATCH_MEAN,
        _TOP_TOKENS,
        "under objective.score_centering: what the recorded tokens of a sampled token have together, in the server",
    ),
    _metric("centering/top_mass_min", "probability", Combined.BATCH_MIN, _TOP_TOKENS, "the smallest of one token; the others are one"),
    _metric("advantage/mean", "reward", Combined.TOKEN_MEAN, _OBJECTIVES, "advantage of a trained token"),
    _metric("policy/version", "updates", Combined.NOW, _FINISH, "optimizer steps applied since the base model"),
    _metric("policy/entropy", "nats", Combined.TOKEN_MEAN, _UPDATE, "entropy of the next-token distribution at a trained token"),
    _metric(
        "policy/kl_to_behaviour",
        "nats",
        Combined.TOKEN_MEAN,
        _OBJECTIVES,
        "estimate of KL(pi_old || pi_theta) per token: rho - 1 - log rho (Schulman's k3)",
    ),
    _metric("loss/policy", "loss", Combined.TOKEN_MEAN, _OBJECTIVES, "the objective's loss per mini-batch"),
    _metric("loss/total", "loss", Combined.UPDATE_MEAN, "parallel/actor.py", "loss that was differentiated"),
    _metric("update/grad_norm", "norm", Combined.UPDATE_MEAN, "parallel/actor.py", "global gradient norm before clipping"),
    _metric("update/learning_rate", "rate", Combined.UPDATE_LAST, _UPDATE, "learning rate"),
    _metric("total/batches_trained", "batches", Combined.RUN_TOTAL, _FINISH, "batches trained so far"),
    _metric("total/rollouts_sampled", "responses", Combined.RUN_TOTAL, _FINISH, "responses sampled so far"),
    _metric("total/rollouts_trained", "responses", Combined.RUN_TOTAL, _FINISH, "responses trained so far"),
    _metric("total/rollouts_dropped", "responses", Combined.RUN_TOTAL, _FINISH, "responses that dynamic sampling dropped so far"),
    _metric("time/sample", "s", Combined.WALL, _FINISH, "from the first request of the batch to its last response"),
    _metric("time/reward", "s", Combined.WALL, _FINISH, "judging responses after the last one had ended"),
    _metric("time/score", "s", Combined.WALL, _FINISH, "log-probs under the weights that sampled, corrections included"),
    _metric("time/update", "s", Combined.WALL, _FINISH, "optimizer steps"),
    _metric("time/sync", "s", Combined.WALL, _FINISH, "new weights into the servers"),
    _metric("time/longest_update", "s", Combined.WALL, _UPDATE, "the longest optimizer step: a stop waits for it"),
    _metric("time/checkpoint", "s", Combined.WALL, _FINISH, "writing the newest checkpoint, from the copy to the disk"),
    _metric(
        "time/evaluate", "s", Combined.WALL, "loop/overlapped.py", "held-out measurement beside training; under schedule: overlapped alone"
    ),
    _metric("time/wait", "s", Combined.WALL, _IDLE, "the trainer has nothing to do and waits for the batch under way"),
    _metric(
        "time/idle_servers",
        "s",
        Combined.WALL,
        _IDLE,
        "the servers sample nothing; under publish: rolling, where each has its own pace, time/servers_wait",
    ),
    _metric(
        "time/tail",
        "s",
        Combined.WALL,
        _SERVERS,
        "from the moment the first server has given its last response to the last response of all, in the last round of sampling",
    ),
    _metric(
        "time/servers_wait",
        "s",
        Combined.WALL,
        _SERVERS,
        "mean over servers: from a server's last response to its first request under newer weights",
    ),
    _metric(
        "time/queued",
        "s",
        Combined.WALL,
        _SERVERS,
        "until the batch's first request is sent; under publish: rolling until a server has finished its share of the batch before",
    ),
    _metric("time/step", "s", Combined.WALL, _FINISH, "wall time of the whole step; phases overlap under schedule: overlapped"),
    _metric(
        "throughput/tokens_per_second",
        "tokens/s",
        Combined.DERIVED,
        _FINISH,
        "batch/tokens / time/step: a response token counts once, in the step that trains it",
    ),
    _metric(
        "throughput/overlap_efficiency",
        "fraction",
        Combined.DERIVED,
        _IDLE,
        "(max(time/sample + time/reward, time/score of the step before + time/update) + time/sync) / time/step, under schedule: "
        "overlapped: 1 when nothing but the longer side takes time; under publish: rolling the servers take time/step - time/idle_servers",
    ),
)

_NAMES = frozenset(metric.name for metric in METRICS)


def check_declared(names: Iterable[str]) -> None:
    """Raise ValueError for a name that is neither in the table nor under custom/. The message suggests the nearest name."""
    for name in names:
        if name not in _NAMES and not name.startswith(CUSTOM):
            raise ValueError(
                f"metric {name!r} is not declared in megatron_minpro/tracking/metrics_table.py; {_near(name)}, or a name under {CUSTOM}"
            )


def _near(name: str) -> str:
    group, slash, _ = name.partition("/")
    same_group = [known for known in sorted(_NAMES) if slash and known.startswith(f"{group}/")]
    return nearest(name, same_group or sorted(_NAMES))
