"""What the actor's optimizer takes from its own settings; its steps against torch's: test_actor.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.optimizer import apply_settings, build_optimizer
from parallel.optimizer_settings import OptimizerSettings

SETTINGS = OptimizerSettings(weight_decay=0.1, betas=(0.9, 0.98), eps=1e-6, gradient_clip=1.0)


def test_settings_replace_those_that_a_checkpoint_brought() -> None:
    adamw = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=1e-3)
    saved = adamw.state_dict()
    saved["param_groups"][0] |= {"betas": (0.5, 0.5), "eps": 1.0, "fused": None}
    adamw.load_state_dict(saved)
    apply_settings(SimpleNamespace(chained_optimizers=[SimpleNamespace(optimizer=adamw)]), SETTINGS)
    [group] = adamw.param_groups
    assert (group["betas"], group["eps"], group["fused"]) == ((0.9, 0.98), 1e-6, True)


@pytest.mark.parametrize(
    ("option", "value"), [("fp16", True), ("loss_scale", 128.0), ("min_lr", 1e-7), ("decoupled_lr", 1e-3), ("log_num_zeros_in_grad", True)]
)
def test_an_option_that_would_scale_gradients_or_do_nothing_is_refused(option: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^megatron\.{option}: decided by the layout, the model or the actor"):
        build_optimizer([], SETTINGS, dtype=torch.float32, options={option: value})


class Reads(TorchDispatchMode):
    """How often a number is read off a tensor: on CUDA the host waits for the device each time."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_the_gradient_norm_is_megatrons_and_read_once(one_rank_group: dist.ProcessGroup) -> None:
    from megatron.core.optimizer import clip_grads
    from megatron.core.utils import local_multi_tensor_l2_norm

    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(size, generator=generator) * 10.0**power for power, size in enumerate(((7,), (1000,), (33, 5), (1,)))]
    with Reads() as reads:
        norm = clip_grads.get_grad_norm_fp32(grads, grad_stats_parallel_group=one_rank_group)
    with mock.patch.object(clip_grads, "l2_norm_impl", local_multi_tensor_l2_norm), Reads() as own_reads:
        assert norm == clip_grads.get_grad_norm_fp32(grads, grad_stats_parallel_group=one_rank_group)
    assert (reads.count, own_reads.count) == (1, 2)  # on CUDA its own reads every norm besides
