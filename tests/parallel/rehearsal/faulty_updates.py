"""Updates that CUDA, NCCL or the rehearsal must refuse: plug-ins for RehearsalRequest.update."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def cpu_tensor_to_nccl(actor: Any, sequences: Any, *, learning_rate: float) -> None:
    dist.all_reduce(torch.ones(3))


def cuda_tensor_to_gloo(actor: Any, sequences: Any, *, learning_rate: float) -> None:
    dist.all_reduce(torch.ones(3, device="cuda"), group=actor._groups.control)


def two_devices(actor: Any, sequences: Any, *, learning_rate: float) -> None:
    torch.ones(3, device="cuda") + torch.ones(3)


def not_contiguous(actor: Any, sequences: Any, *, learning_rate: float) -> None:
    dist.all_reduce(torch.ones(4, 3, device="cuda").t())


def two_dtypes(actor: Any, sequences: Any, *, learning_rate: float) -> None:
    torch.ones(3, 3, device="cuda") @ torch.ones(3, 3, device="cuda", dtype=torch.bfloat16)


def dtypes_of_a_collective(actor: Any, sequences: Any, *, learning_rate: float) -> None:
    dist.all_gather_into_tensor(torch.ones(8, device="cuda"), torch.ones(4, device="cuda", dtype=torch.bfloat16))


def numbers_that_nccl_lacks(actor: Any, sequences: Any, *, learning_rate: float) -> None:
    dist.all_reduce(torch.ones(3, device="cuda", dtype=torch.int16))


def odd_rows_of_a_grouped_product(actor: Any, sequences: Any, *, learning_rate: float) -> None:
    x = torch.ones(6, 12, device="cuda", dtype=torch.bfloat16)
    w = torch.ones(2, 12, 8, device="cuda", dtype=torch.bfloat16)
    torch.nn.functional.grouped_mm(x, w, offs=torch.tensor([2, 6], device="cuda", dtype=torch.int32))


def numpy_on_the_device(actor: Any, sequences: Any, *, learning_rate: float) -> None:
    torch.ones(3, device="cuda").numpy()


def random_order_of_sums(actor: Any, sequences: Any, *, learning_rate: float) -> None:
    torch.ones(3, device="cuda").cumsum(0)


def choice_by_weights(actor: Any, sequences: Any, *, learning_rate: float) -> None:
    weights = next(iter(actor._local.values())).detach().float()
    torch.masked_select(weights, weights > 0)


def unknown_operator(actor: Any, sequences: Any, *, learning_rate: float) -> None:
    @torch.library.custom_op("minpro_test::nobody_knows", mutates_args=())
    def nobody_knows(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    nobody_knows(torch.ones(3, device="cuda"))
