"""What a machine offers decides, in one record, which of two ways everything runs."""

from __future__ import annotations

import pytest
import torch

from parallel.capabilities import Capabilities, Layers, detect
from parallel.engine_import import EngineImport
from parallel.megatron_options import check_machine_options
from parallel.weights import canonical_name

BROKEN = EngineImport(version="2.9", error="ImportError: undefined symbol: _ZN3c10")


def machine(
    *, cuda_devices: int = 0, engine: EngineImport | str | None = None, compute_capability: tuple[int, int] | None = None
) -> Capabilities:
    return Capabilities(
        cuda_devices=cuda_devices,
        device_name="a device",
        torch_version="2",
        megatron_core_version="0.16.1",
        transformer_engine=engine if isinstance(engine, EngineImport) else EngineImport(version=engine, error=None),
        apex_version=None,
        compute_capability=compute_capability,
    )


OURS = "layers: the local layer spec with this project's attention, norm and experts"


@pytest.mark.parametrize(
    ("found", "setting", "layers", "said"),
    [
        (machine(), "auto", "local", OURS),
        (machine(cuda_devices=8), "auto", "local", f"{OURS}; TransformerEngine absent"),
        # Importable, but of no use without a device.
        (machine(engine="2.9"), "auto", "local", OURS),
        (machine(cuda_devices=1, engine="2.9"), "auto", "transformer_engine", "layers: TransformerEngine 2.9's layer spec"),
        (machine(cuda_devices=1, engine="2.9"), "local", "local", f"{OURS}; actor.layers = local"),
        (machine(cuda_devices=1, engine="2.9"), "transformer_engine", "transformer_engine", "layers: TransformerEngine 2.9's layer spec"),
        (
            machine(cuda_devices=1, engine=BROKEN),
            "auto",
            "local",
            f"{OURS}; {BROKEN.describe()}",
        ),
    ],
)
def test_layers_follow_the_setting_and_what_imports(found: Capabilities, setting: Layers, layers: str, said: str) -> None:
    chosen = found.choose_layers(setting)
    assert chosen.layer_spec == layers
    assert chosen.lines()[-1] == said


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (machine(engine="2.9"), "this machine has no CUDA device"),
        (machine(cuda_devices=1), "TransformerEngine absent"),
        (
            machine(cuda_devices=1, engine=BROKEN),
            r"TransformerEngine 2\.9 is installed but does not import \(ImportError: undefined symbol",
        ),
    ],
)
def test_demanded_layers_that_are_not_there_are_refused(found: Capabilities, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"^actor\.layers: 'transformer_engine', but {reason}.*; expected auto or local here$"):
        found.choose_layers("transformer_engine")


def test_attention_needs_no_mask_where_flash_attention_runs() -> None:
    hopper, volta = (machine(cuda_devices=1, compute_capability=each) for each in ((9, 0), (7, 0)))
    assert hopper.attention_product(torch.bfloat16) == "varlen"
    assert {each.attention_product(torch.float32) for each in (hopper, volta, machine())} == {"grid"}
    assert machine().attention_product(torch.bfloat16) == "grid"
    with pytest.raises(ValueError, match=r"^model\.dtype: bfloat16 with the local layers needs flash attention .*; a device has 7\.0; "):
        volta.attention_product(torch.bfloat16)


def test_fp8_without_transformer_engine_is_an_error() -> None:
    for name in ("fp8", "fp4"):
        with pytest.raises(ValueError, match=rf"^megatron\.{name} = 'e4m3': needs TransformerEngine on CUDA, here is the local layer spec"):
            check_machine_options({name: "e4m3"}, machine(cuda_devices=8))
        check_machine_options({name: "e4m3"}, machine(cuda_devices=8, engine="2.9"))
        check_machine_options({name: None}, machine())


def test_norms_are_recomputed_with_transformer_engine_alone() -> None:
    with pytest.raises(ValueError, match=r"^megatron\.recompute_modules holds 'layernorm', .*; remove it$"):
        check_machine_options({"recompute_modules": ["mlp", "layernorm"]}, machine(cuda_devices=8))
    check_machine_options({"recompute_modules": ["mlp", "core_attn"]}, machine(cuda_devices=8))
    check_machine_options({"recompute_modules": ["layernorm"]}, machine(cuda_devices=8, engine="2.9"))


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
