"""What a machine offers decides, in one record, which of two ways everything runs."""

from __future__ import annotations

import pytest

from parallel.capabilities import Capabilities, detect
from parallel.megatron_options import check_machine_options
from parallel.weights import canonical_name


def machine(*, cuda_devices: int = 0, transformer_engine_version: str | None = None) -> Capabilities:
    return Capabilities(
        cuda_devices=cuda_devices,
        device_name="a device",
        torch_version="2",
        megatron_core_version="0.16.1",
        transformer_engine_version=transformer_engine_version,
        apex_version=None,
    )


@pytest.mark.parametrize(
    ("found", "layers", "said"),
    [
        (machine(), "local", "layers: the local layer spec with this project's attention, norm and experts (loop)"),
        (machine(cuda_devices=8), "local", "layers: the local layer spec with this project's attention, norm and experts (grouped)"),
        # Importable, but of no use without a device.
        (
            machine(transformer_engine_version="2.9"),
            "local",
            "layers: the local layer spec with this project's attention, norm and experts (loop)",
        ),
        (machine(cuda_devices=1, transformer_engine_version="2.9"), "transformer_engine", "layers: TransformerEngine 2.9's layer spec"),
    ],
)
def test_transformer_engine_is_used_with_cuda_and_the_choice_is_said(found: Capabilities, layers: str, said: str) -> None:
    assert found.layer_spec == layers
    assert found.lines()[-1] == said


def test_fp8_without_transformer_engine_is_an_error() -> None:
    for name in ("fp8", "fp4"):
        with pytest.raises(ValueError, match=rf"^megatron\.{name} = 'e4m3': needs TransformerEngine on CUDA, here is the local layer spec"):
            check_machine_options({name: "e4m3"}, machine(cuda_devices=8))
        check_machine_options({name: "e4m3"}, machine(cuda_devices=8, transformer_engine_version="2.9"))
        check_machine_options({name: None}, machine())


def test_the_flexible_dispatcher_needs_cuda() -> None:
    check_machine_options({"moe_token_dispatcher_type": "flex"}, machine(cuda_devices=8))
    with pytest.raises(ValueError, match=r"^megatron\.moe_token_dispatcher_type = 'flex': needs CUDA and DeepEP"):
        check_machine_options({"moe_token_dispatcher_type": "flex"}, machine())


def test_this_machine_is_described() -> None:
    assert detect().lines()[0].startswith("device: ")


@pytest.mark.parametrize(
    ("engine", "table"),
    [
        ("decoder.layers.3.self_attention.linear_qkv.layer_norm_weight", "decoder.layers.3.input_layernorm.weight"),
        ("decoder.layers.3.mlp.linear_fc1.layer_norm_weight", "decoder.layers.3.pre_mlp_layernorm.weight"),
        ("decoder.layers.3.mlp.experts.linear_fc1.weight12", "decoder.layers.3.mlp.experts.local_experts.12.linear_fc1.weight"),
        ("decoder.layers.3.mlp.experts.linear_fc2.weight0", "decoder.layers.3.mlp.experts.local_experts.0.linear_fc2.weight"),
        # The same under both specs.
        ("decoder.layers.3.pre_mlp_layernorm.weight", "decoder.layers.3.pre_mlp_layernorm.weight"),
        ("decoder.layers.3.mlp.linear_fc1.weight", "decoder.layers.3.mlp.linear_fc1.weight"),
        ("decoder.layers.3.self_attention.q_layernorm.weight", "decoder.layers.3.self_attention.q_layernorm.weight"),
        (
            "decoder.layers.3.mlp.experts.local_experts.1.linear_fc1.weight",
            "decoder.layers.3.mlp.experts.local_experts.1.linear_fc1.weight",
        ),
    ],
)
def test_parameters_of_transformer_engines_spec_have_the_tables_names(engine: str, table: str) -> None:
    assert canonical_name(engine) == table
