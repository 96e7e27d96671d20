"""From rewards to advantages: how good a response is, compared with the others sampled for the same prompt.

Every estimator takes rewards [G groups, K responses], or rewards [N] with `group_ids` [N] where groups differ in size, and returns fp32 of
the same shape. Statistics are taken in float64. A group whose rewards are all equal has advantage exactly 0, as has a group of one: nothing
can be learnt from a comparison without a difference. (Its tokens still count in a token-mean's denominator.)

Shapes: N responses, G groups; shape is [G, K] or [N].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from megatron_minpro.objectives.options import check_number
from megatron_minpro.registry import PlugIns


def group_normalized(
    rewards: Float[Tensor, "*shape"], group_ids: Int64[Tensor, "*shape"] | None = None, *, epsilon: float = 1e-6
) -> Float32[Tensor, "*shape"]:
    """(R - mean) / (std + epsilon) within each group, with the unbiased standard deviation (divisor K - 1).

    Source: GRPO (arXiv:2402.03300, section 4.1.2), which leaves divisor and epsilon open; both are those of common implementations.
    """
    check_number("epsilon", epsilon, above=0)
    groups = _groups(rewards, group_ids)
    variance_G = groups.sum(groups.centered_N.square()) / (groups.count_G - 1).clamp(min=1)
    return groups.shaped(groups.centered_N / (groups.spread(variance_G.sqrt()) + epsilon))


def mean_only(rewards: Float[Tensor, "*shape"], group_ids: Int64[Tensor, "*shape"] | None = None) -> Float32[Tensor, "*shape"]:
    """R - mean within each group. Source: Dr.GRPO (arXiv:2503.20783, section 3.2)."""
    groups = _groups(rewards, group_ids)
    return groups.shaped(groups.centered_N)


def leave_one_out(rewards: Float[Tensor, "*shape"], group_ids: Int64[Tensor, "*shape"] | None = None) -> Float32[Tensor, "*shape"]:
    """R minus the mean of the *other* responses of its group, (R - mean) K / (K - 1). Source: RLOO (arXiv:2402.14740, eq. 8)."""
    groups = _groups(rewards, group_ids)
    factor_G = groups.count_G / (groups.count_G - 1).clamp(min=1)
    return groups.shaped(groups.centered_N * groups.spread(factor_G))


def batch_whitened(
    rewards: Float[Tensor, "*shape"], group_ids: Int64[Tensor, "*shape"] | None = None, *, epsilon: float = 1e-6
) -> Float32[Tensor, "*shape"]:
    """(R - mean) / (std + epsilon) over the whole batch, groups ignored, unbiased standard deviation; per response, not weighted by length.

    Source: REINFORCE++ (arXiv:2501.03262), which whitens over a batch instead of a group. A batch of equal rewards is 0.
    """
    checked = _groups(rewards, group_ids)
    one_group = torch.zeros(checked.rewards_N.numel(), dtype=torch.int64, device=rewards.device)
    return group_normalized(rewards.reshape(-1), one_group, epsilon=epsilon).view(rewards.shape)


_HERE = "megatron_minpro.objectives.advantages"
ESTIMATORS = PlugIns(
    setting="advantages.estimator",
    options="advantages",
    known={
        "group_normalized": f"{_HERE}:group_normalized",
        "leave_one_out": f"{_HERE}:leave_one_out",
        "mean_only": f"{_HERE}:mean_only",
        "batch_whitened": f"{_HERE}:batch_whitened",
    },
)


def make_advantages(estimator: str, **options: object) -> Callable[..., Tensor]:
    """An estimator with its options: a function of rewards, and of group_ids where groups differ in size.

    Args:
        estimator: a key of the table above, or package.module:function for `function(rewards, group_ids, *, options)`.
        options: keyword arguments of the estimator.

    Raises:
        PlugInError: the estimator or an option is unknown (the message has the nearest known name), missing, or out of range.
    """
    function = ESTIMATORS.find(estimator, options, passed=2)
    made = partial(function, **options)
    try:
        tried = made(torch.zeros(1), torch.zeros(1, dtype=torch.int64))  # each estimator checks its own options
    except Exception as error:  # a function of the user's own may raise anything
        raise ESTIMATORS.refused(estimator, error) from error
    if not isinstance(tried, Tensor) or tried.shape != (1,):
        raise ESTIMATORS.refused(estimator, TypeError("gave no tensor with one advantage per reward"))
    return made


@dataclass(frozen=True, eq=False)
class _Groups:
    rewards_N: Tensor  # float64
    group_N: Tensor  # int64, 0 to G - 1
    count_G: Tensor  # float64
    centered_N: Tensor  # float64, exactly 0 in groups of equal rewards
    shape: torch.Size

    def sum(self, x_N: Tensor) -> Tensor:
        return torch.zeros_like(self.count_G).index_add(0, self.group_N, x_N)

    def spread(self, x_G: Tensor) -> Tensor:
        return x_G[self.group_N]

    def shaped(self, x_N: Tensor) -> Tensor:
        return x_N.float().view(self.shape)


def _groups(rewards: Tensor, group_ids: Tensor | None) -> _Groups:
    if group_ids is None:
        if rewards.dim() != 2:
            raise ValueError(f"rewards must be [groups, responses], or [responses] with group_ids; got shape {list(rewards.shape)}")
        group_ids = torch.arange(rewards.shape[0], device=rewards.device)[:, None].expand(rewards.shape).reshape(-1)
    elif rewards.dim() != 1 or group_ids.shape != rewards.shape:
        raise ValueError(f"with group_ids both must be [responses]; got rewards {list(rewards.shape)}, group_ids {list(group_ids.shape)}")
    if rewards.numel() == 0:
        raise ValueError("rewards is empty")
    rewards_N = rewards.detach().double().reshape(-1)
    if not rewards_N.isfinite().all():
        raise ValueError(f"rewards[{int((~rewards_N.isfinite()).nonzero()[0, 0])}] (flattened) is not finite")
    _, group_N, count_G = group_ids.unique(return_inverse=True, return_counts=True)
    count_G = count_G.double()
    mean_G = torch.zeros_like(count_G).index_add(0, group_N, rewards_N) / count_G
    low_G = torch.zeros_like(count_G).scatter_reduce(0, group_N, rewards_N, "amin", include_self=False)
    high_G = torch.zeros_like(count_G).scatter_reduce(0, group_N, rewards_N, "amax", include_self=False)
    # The mean of equal numbers may differ from them in the last digit, which a standard deviation of about 0 would blow up.
    centered_N = torch.where((low_G == high_G)[group_N], 0.0, rewards_N - mean_G[group_N])
    return _Groups(rewards_N=rewards_N, group_N=group_N, count_G=count_G, centered_N=centered_N, shape=rewards.shape)
