"""What the actor's optimizer takes from its own settings; its steps against torch's: test_actor.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

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
