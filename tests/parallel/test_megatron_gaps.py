"""Faults of Megatron-Core without TransformerEngine and Apex: corrected where CUDA is present too. Every actor test meets them on a CPU."""

from __future__ import annotations

import subprocess
import sys

import pytest

# As much of a machine with CUDA as importing takes: Megatron-Core is then loaded as shipped, without the CPU hook.
PROGRAM = """
import torch
really_available, torch.cuda.is_available = torch.cuda.is_available, lambda: True
from types import SimpleNamespace
import parallel.mcore
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.moe.moe_utils import router_gating_linear
torch.cuda.is_available = really_available  # torch built for CUDA would now ask the driver

x = torch.tensor([[1.0, 2.0]], requires_grad=True)
print(router_gating_linear(x, torch.tensor([[3.0, 4.0], [5.0, 6.0]]), None, torch.float32).tolist())

main = torch.zeros(2)
main.grad = torch.ones(2)
adamw = torch.optim.AdamW([main])
adamw.step(), adamw.step()
config = SimpleNamespace(use_precision_aware_optimizer_no_fp8_or_ds_fp8=False)
optimizer = SimpleNamespace(model_param_group_index_map={"weight": (0, 0)}, optimizer=adamw, config=config)
loaded = {"param": torch.full((2,), 7.0), "exp_avg": torch.full((2,), 8.0), "exp_avg_sq": torch.full((2,), 9.0)}
DistributedOptimizer._set_main_param_and_optimizer_states(optimizer, "weight", loaded)

from megatron.core.tensor_parallel import layers
main_grad = torch.ones(1, 2)
layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[5.0], [6.0]]), main_grad)
print(layers._grad_accum_fusion_available, main_grad.tolist())
print(main.tolist(), {name: value.tolist() for name, value in adamw.state[main].items()})
"""


@pytest.fixture(scope="module")
def printed() -> list[str]:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_weight_gradients_are_added_in_place_without_apex(printed: list[str]) -> None:
    assert printed[-2] == "True [[24.0, 35.0]]"


def test_the_router_multiplies_without_transformer_engine(printed: list[str]) -> None:
    assert printed[-3] == "[[11.0, 17.0]]"


def test_a_loaded_optimizer_state_keeps_its_step(printed: list[str]) -> None:
    assert printed[-1] == "[7.0, 7.0] {'step': 2.0, 'exp_avg': [8.0, 8.0], 'exp_avg_sq': [9.0, 9.0]}"
