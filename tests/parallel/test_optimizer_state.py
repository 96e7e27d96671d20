"""Moments without a step: what Megatron's own step with gradients of zero would leave, and no byte more on the way."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.mcore import HybridDeviceOptimizer
from parallel.optimizer_state import create_state

SIZES = ((300,), (7,), (0,), (1000,))


class AllocatedBytes(TorchDispatchMode):
    """Bytes of all storages that operators made inside the block and that still live; their highest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            storage = out.untyped_storage()
            if storage._cdata not in self._seen and not any(isinstance(x, torch.Tensor) and x.data_ptr() == out.data_ptr() for x in args):
                self._seen.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return out

    def _free(self, key: int, nbytes: int) -> None:
        self._seen.discard(key)
        self.live -= nbytes


class PartlyFused(torch.optim.Optimizer):
    """FusedAdam as far as its state goes (TransformerEngine 2.x): a step makes it, with gradients or without, in dtypes of its own."""

    def __init__(self, parameters: list[torch.Tensor]) -> None:
        super().__init__(parameters, {"lr": 0.0})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                names = ("exp_avg", "exp_avg_sq", "master_param")
                self.state[parameter] = {name: torch.zeros_like(parameter, dtype=torch.bfloat16) for name in names}


def parameters() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator) for size in SIZES]


def distributed(inner: torch.optim.Optimizer, *, precision_aware: bool = False) -> Any:
    return SimpleNamespace(optimizer=inner, config=SimpleNamespace(use_precision_aware_optimizer=precision_aware))


def adamw(tensors: list[torch.Tensor]) -> torch.optim.AdamW:
    return torch.optim.AdamW([{"params": tensors[:2]}, {"params": tensors[2:], "weight_decay": 0.0}], lr=0.0, fused=True)


def train(optimizer: torch.optim.Optimizer, tensors: list[torch.Tensor]) -> None:
    generator = torch.Generator().manual_seed(1)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for _ in range(2):
        for tensor in tensors:
            tensor.grad = torch.randn(tensor.shape, generator=generator)
        optimizer.step()


def test_state_and_steps_equal_those_after_megatrons_dummy_step() -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    made, dummy = parameters(), parameters()
    ours, theirs = adamw(made), adamw(dummy)
    create_state(distributed(ours))
    DistributedOptimizer._init_optimizer_states_with_dummy_values(distributed(theirs))
    for state in theirs.state.values():
        assert float(state["step"]) == 1  # Megatron counts it
        state["step"].zero_()
    empty = ours.state.pop(made[2])  # the dummy step leaves a parameter without elements out
    assert {name: (x.numel(), x.dtype) for name, x in empty.items() if name != "step"} == dict.fromkeys(
        ("exp_avg", "exp_avg_sq"), (0, torch.float32)
    )
    for a, b in zip(made, dummy, strict=True):
        assert torch.equal(a, b)
        assert list(ours.state[a]) == list(theirs.state[b])
        for x, y in zip(ours.state[a].values(), theirs.state[b].values(), strict=True):
            assert (x.dtype, x.device, x.shape) == (y.dtype, y.device, y.shape)
            assert torch.equal(x, y)
    assert ours.state_dict()["param_groups"] == theirs.state_dict()["param_groups"]
    train(ours, made)
    train(theirs, dummy)
    assert all(torch.equal(a, b) for a, b in zip(made, dummy, strict=True))


def test_nothing_but_the_moments_is_allocated() -> None:
    tensors = parameters()
    optimizer = adamw(tensors)
    with AllocatedBytes() as allocated:
        create_state(distributed(optimizer))
    elements = sum(tensor.numel() for tensor in tensors)
    assert allocated.peak == allocated.live == 2 * 4 * elements + 4 * len(tensors)  # two moments, and a step for each parameter


def test_the_counter_of_allocations_sees_gradients_of_zero() -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    tensors = parameters()
    with AllocatedBytes() as allocated:
        DistributedOptimizer._init_optimizer_states_with_dummy_values(distributed(adamw(tensors)))
    assert allocated.peak >= 3 * 4 * sum(tensor.numel() for tensor in tensors)


@pytest.mark.parametrize(("precision_aware", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_fused_adam_has_its_state_and_no_step_behind_it(precision_aware: bool, dtype: torch.dtype) -> None:
    tensors = parameters()
    optimizer = PartlyFused(tensors)
    create_state(distributed(optimizer, precision_aware=precision_aware))
    assert [group["step"] for group in optimizer.param_groups] == [0]
    for tensor in tensors:
        state = optimizer.state[tensor]
        assert list(state) == ["exp_avg", "exp_avg_sq", "master_param"][: 3 if precision_aware else 2]
        assert all(x.dtype == dtype and x.shape == tensor.shape and not x.any() for x in state.values())
        assert tensor.grad is None


def test_offloaded_parts_and_the_whole_share_one_state() -> None:
    tensors = parameters()
    optimizer = HybridDeviceOptimizer(
        tensors, offload_fraction=1.0, cpu_optimizer_cls=torch.optim.AdamW, gpu_optimizer_cls=PartlyFused, param_update_in_fp32=True, lr=0.1
    )
    create_state(distributed(optimizer))
    of_parts = {parameter: state for part in optimizer.sub_optimizers for parameter, state in part.state.items()}
    assert len(of_parts) == len(tensors)
    for tensor in tensors:
        state = optimizer.state[tensor]
        assert state is of_parts[optimizer.param_to_inner_param[tensor]]
        assert {name: float(x.sum()) for name, x in state.items() if name != "master_param"} == {"step": 0, "exp_avg": 0, "exp_avg_sq": 0}
