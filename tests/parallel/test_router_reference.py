"""The table of router options in parallel/README.md says what the code accepts and refuses."""

from __future__ import annotations

import dataclasses
import re

import pytest

from parallel import router_reference
from parallel.actor import check_option_names
from parallel.megatron_options import check_machine_options
from parallel.router_reference import ACCEPTED, DECIDED, router_options
from tests.parallel.test_model_options import MOE, ON_CPU, build

BALANCE = ("moe_router_load_balancing_type", "moe_aux_loss_coeff")
VALUES = {"moe_router_dtype": "fp32", "moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.01}


def test_the_table_in_the_readme_is_current() -> None:
    page = router_reference.PAGE.read_text(encoding="utf-8")
    assert page == router_reference.replaced(page), "stale: make docs"


@pytest.mark.parametrize("option", router_options())
def test_a_row_says_what_the_code_does_with_the_option(option: str) -> None:
    [row] = re.findall(rf"^\| `{option}` \| (.*?) \| (.*) \|$", router_reference.render(), re.MULTILINE)
    if option in ACCEPTED:
        options = {name: VALUES[name] for name in VALUES if option in BALANCE and name in BALANCE} | {option: VALUES.get(option, True)}
        check_option_names(options)
        if "TransformerEngine" in row[1] or option.endswith("fp8"):
            with pytest.raises(ValueError, match=rf"^megatron\.{option} = True: needs TransformerEngine on CUDA"):
                check_machine_options(options, ON_CPU)
            return
        assert getattr(build(**options), option) == options[option]
        return
    if option in DECIDED:
        with pytest.raises(ValueError, match=rf"^megatron\.{option}: decided by the layout, the model or the actor"):
            build(**{option: 3})
        return
    with pytest.raises(ValueError) as refusal:
        check_option_names({option: 3})
    reason = row[1].removeprefix("refused: ")
    assert str(refusal.value) == f"megatron.{option} = 3: {reason}; remove it"
    assert "not checked" not in reason  # somebody has read what it does


def test_an_unknown_dtype_of_the_router_is_refused() -> None:
    """Megatron-Core takes any other word for the model's dtype."""
    with pytest.raises(ValueError, match=r"^megatron\.moe_router_dtype = 'bf16': expected fp32, fp64 or null \(the model's dtype\)$"):
        check_option_names({"moe_router_dtype": "bf16"})


@pytest.mark.parametrize(("num_experts", "expected"), [(8, None), (31, None), (32, "fp32"), (128, "fp32")])
def test_the_router_computes_in_fp32_with_32_experts_and_more(num_experts: int, expected: str | None) -> None:
    many = dataclasses.replace(MOE, num_experts=num_experts)
    assert build(many).moe_router_dtype == expected
    assert build(many, moe_router_dtype=None).moe_router_dtype is None
    assert build(many, moe_router_dtype="fp64").moe_router_dtype == "fp64"
