"""What CUDA and NCCL would raise is raised, with operator and call site; what cannot be rehearsed is refused in one line."""

from __future__ import annotations

import re

import pytest

from parallel.rehearsal.launch import rehearse
from parallel.rehearsal.request import RehearsalRequest
from parallel.rehearsal.result import RehearsalResult
from tests.parallel.rehearsal.tiny import DENSE, MOE, importable_tests, request

FAULTS = {
    "cpu_tensor_to_nccl": "all_reduce over all ranks (nccl) .*: a tensor on the CPU .*NCCL takes CUDA tensors only",
    "cuda_tensor_to_gloo": "all_reduce over all ranks (gloo) .*: a tensor on CUDA",
    "two_devices": "aten.add.Tensor .*: tensors on more than one device .*cuda:0 .3., cpu .3.",
    "not_contiguous": "all_reduce .*: a tensor that is not contiguous",
    "two_dtypes": "aten.mm.default .*: factors of different dtypes .torch.float32, torch.bfloat16.",
    "dtypes_of_a_collective": "all_gather .*: input and output differ in dtype .torch.bfloat16, torch.float32.",
    "numbers_that_nccl_lacks": "all_reduce .*: dtype torch.int16; NCCL does not know it",
    "odd_rows_of_a_grouped_product": "_grouped_mm.* rows of 12 torch.bfloat16 numbers",
    "numpy_on_the_device": "numpy of a tensor on CUDA",
    "random_order_of_sums": "aten.cumsum.default .*: no deterministic CUDA kernel",
}
REFUSALS = {
    "choice_by_weights": "aten.masked_select.default .*: its shape depends on values that were not computed",
    "unknown_operator": "minpro_test.nobody_knows.default .*: torch has no fake kernel for this operator",
}


def faulty(update: str) -> RehearsalRequest:
    return request(
        {**DENSE, "num_hidden_layers": 1},
        world_size=2,
        phases=("build", "update"),
        update=f"tests.parallel.rehearsal.faulty_updates:{update}",
        update_options={},
        deterministic=update == "random_order_of_sums",
    )


@pytest.fixture(scope="module")
def results() -> dict[str, RehearsalResult]:
    with importable_tests():
        return dict(zip(FAULTS, rehearse([faulty(name) for name in FAULTS]), strict=True))


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_the_device_ends_the_phase(name: str, results: dict[str, RehearsalResult]) -> None:
    fault = results[name].fault
    assert fault is not None and fault.of_device and fault.phase == "update"
    assert re.search(FAULTS[name].replace("(nccl)", r"\(nccl\)").replace("(gloo)", r"\(gloo\)"), fault.message)


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_rehearsed_is_named_with_its_operator(name: str) -> None:
    with importable_tests(), pytest.raises(ValueError, match=REFUSALS[name]):
        rehearse([faulty(name)])


def test_an_option_that_the_actor_refuses_is_named() -> None:
    with pytest.raises(ValueError, match=r"megatron\.use_precision_aware_optimizer .* needs TransformerEngine"):
        rehearse([request(MOE, world_size=1, megatron_options={"use_precision_aware_optimizer": True})])
