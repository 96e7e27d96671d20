"""Options handed through to Megatron-Core: known ones arrive, unknown and decided ones are refused by name."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from checkpoints_convert.hf_config import Architecture
from parallel.actor import check_option_names, split_options
from parallel.capabilities import Capabilities
from parallel.engine_import import EngineImport
from parallel.layout import ParallelLayout
from parallel.mcore import TransformerConfig
from parallel.megatron_options import HARMLESS, REASONS, check_effect, check_machine_options
from parallel.model import TRANSFORMER_FIELDS, engine_kernels, transformer_config
from parallel.optimizer import OPTIMIZER_FIELDS, build_optimizer
from parallel.optimizer_settings import OptimizerSettings
from parallel.overlap import OVERLAP_FIELDS, data_parallel_config

ON_CPU = Capabilities(
    cuda_devices=0,
    device_name="CPU",
    torch_version="2",
    megatron_core_version="0",
    transformer_engine=EngineImport(version=None, error=None),
    apex_version=None,
)
MOE = Architecture(
    model_type="qwen3_moe",
    vocab_size=96,
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=48,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    norm_topk_prob=True,
    rms_norm_eps=1e-5,
    rope_theta=1e6,
    max_position_embeddings=512,
    tie_word_embeddings=False,
    dtype=None,
)


def build(
    architecture: Architecture = MOE,
    *,
    layout: dict | None = None,
    recompute: str = "none",
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> TransformerConfig:
    return transformer_config(
        architecture, ParallelLayout(**(layout or {"world_size": 1})), ON_CPU, dtype=dtype, recompute=recompute, options=options
    )


def test_transformer_engines_layers_run_their_faster_kernels() -> None:
    engine = EngineImport(version="2.20.2", error=None)
    with_engine = dataclasses.replace(ON_CPU, cuda_devices=8, transformer_engine=engine)
    dense = dataclasses.replace(MOE, num_experts=None, num_experts_per_tok=None, moe_intermediate_size=None)
    assert engine_kernels(MOE, with_engine) == {"apply_rope_fusion": True, "moe_permute_fusion": True}
    assert engine_kernels(dense, with_engine) == {"apply_rope_fusion": True}
    assert engine_kernels(MOE, with_engine.choose_layers("local")) == engine_kernels(MOE, ON_CPU) == {}


@pytest.mark.parametrize("on_gpu", [False, True])
def test_weight_gradients_are_always_added_in_place(on_gpu: bool) -> None:
    machine = dataclasses.replace(ON_CPU, cuda_devices=8) if on_gpu else ON_CPU  # without Apex and TransformerEngine
    config = transformer_config(MOE, ParallelLayout(world_size=1), machine, dtype=torch.float32, recompute="none", options={})
    assert config.gradient_accumulation_fusion
    assert not config.batch_p2p_sync


def test_the_models_shape_arrives_in_megatrons_configuration() -> None:
    config = build()
    found = (
        config.num_layers,
        config.hidden_size,
        config.num_query_groups,
        config.kv_channels,
        config.num_moe_experts,
        config.moe_router_topk,
    )
    assert found == (4, 32, 2, 16, 8, 2)
    assert (config.moe_ffn_hidden_size, config.layernorm_epsilon, config.calculate_per_token_loss) == (24, 1e-5, True)


def test_an_unknown_option_is_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(ValueError) as refusal:
        build(moe_router_topkk=3)
    assert "megatron.moe_router_topkk: the installed megatron-core has no such option; did you mean 'moe_router_topk'?" in str(
        refusal.value
    )


def test_an_option_that_is_decided_elsewhere_is_refused_with_its_value() -> None:
    with pytest.raises(ValueError, match=r"^megatron\.num_layers: decided by the layout, the model or the actor \(here 4\); remove it$"):
        build(num_layers=5)
    with pytest.raises(ValueError, match=r"^megatron\.calculate_per_token_loss: decided .*\(here True\)"):
        build(calculate_per_token_loss=True)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("fp16", True),
        ("layernorm_zero_centered_gamma", True),
        ("mtp_num_layers", 1),
        ("no_rope_freq", 2),
        ("qk_l2_norm", True),
        ("rotary_interleaved", True),
        ("softmax_type", "off-by-one"),
        ("window_size", [2, 0]),
    ],
)
def test_what_the_plug_ins_would_leave_out_without_a_word_is_refused(option: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^megatron\.{option}: decided by the layout, the model or the actor"):
        build(**{option: value})
    with pytest.raises(ValueError, match=rf"^megatron\.{option}: decided by the layout, the model or the actor"):
        check_option_names({option: value})  # before any process starts


def test_an_option_reaches_every_configuration_that_knows_it() -> None:
    options = {"fp8_recipe": "tensorwise", "fp8": "hybrid", "optimizer_cpu_offload": True, "overlap_grad_reduce": True, "unknown": 1}
    model, optimizer, overlap = split_options(options)
    assert model == {"fp8_recipe": "tensorwise", "fp8": "hybrid", "unknown": 1}
    assert optimizer == {"fp8_recipe": "tensorwise", "optimizer_cpu_offload": True}
    assert overlap == {"overlap_grad_reduce": True}


def test_an_option_left_open_arrives() -> None:
    assert build().moe_aux_loss_coeff == 0.0
    config = build(moe_aux_loss_coeff=0.01, moe_router_load_balancing_type="seq_aux_loss", moe_router_dtype="fp32")
    assert (config.moe_aux_loss_coeff, config.moe_router_load_balancing_type, config.moe_router_dtype) == (0.01, "seq_aux_loss", "fp32")


OTHER_EXPERTS = "experts would be chosen or weighted otherwise than by the servers and in the export"
OTHER_MODEL = "the servers and the export know no such part, so another model would be trained"


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("moe_router_force_load_balancing", True, "every token would go to random experts, to other ones in every pass"),
        ("moe_router_topk_scaling_factor", 2.5, OTHER_EXPERTS),
        ("moe_router_num_groups", 4, OTHER_EXPERTS),
        ("moe_router_group_topk", 2, OTHER_EXPERTS),
        ("moe_layer_freq", 2, "all layers of this model are alike, so it does nothing here"),
        ("moe_shared_expert_intermediate_size", 64, OTHER_MODEL),
        ("decoupled_weight_decay", False, "without it weight decay is a part of the gradient, which is Adam and no longer AdamW"),
        ("muon_momentum", 0.9, "the optimizer is AdamW as actor.optimizer describes it"),
        ("init_method_std", 0.5, "weights come from model.path"),
        ("cuda_graph_impl", "local", "packed micro-batches differ in length, and a recorded graph needs one"),
        ("heterogeneous_block_specs", True, OTHER_MODEL),
    ],
)
def test_what_would_make_another_model_is_refused_by_name(option: str, value: object, reason: str) -> None:
    with pytest.raises(ValueError) as refusal:
        check_option_names({option: value})  # before any process starts
    assert str(refusal.value) == f"megatron.{option} = {value!r}: {reason}; remove it"


def test_every_option_of_megatron_is_known_as_harmless_or_refused() -> None:
    known = TRANSFORMER_FIELDS | OPTIMIZER_FIELDS | OVERLAP_FIELDS
    refused = set()
    for option in known:
        try:
            check_option_names({option: True})
        except ValueError as refusal:
            assert str(refusal).startswith(f"megatron.{option}") and "\n" not in str(refusal)
            refused.add(option)
    value_rules = {"moe_aux_loss_coeff", "moe_router_load_balancing_type", "moe_router_dtype", "bucket_size", "overlap_param_gather"}
    assert known - refused == (HARMLESS.keys() & known) - value_rules
    assert not set(REASONS) & set(HARMLESS)
    assert len(known - refused) < len(known) / 4  # what nobody has read about is refused: the list does not grow with Megatron


def test_an_option_that_would_do_nothing_is_refused_with_what_it_needs() -> None:
    dense = dataclasses.replace(
        MOE, model_type="qwen3", num_experts=None, num_experts_per_tok=None, moe_intermediate_size=None, norm_topk_prob=None
    )
    with pytest.raises(ValueError, match=r"^megatron\.moe_router_dtype = 'fp32': the model has no experts; remove it$"):
        check_effect({"moe_router_dtype": "fp32"}, dense, recompute="none")
    with pytest.raises(ValueError, match=r"^megatron\.fp8_recipe = 'delayed': does nothing without megatron\.fp8; set it, or remove"):
        check_effect({"fp8_recipe": "delayed"}, MOE, recompute="none")
    with pytest.raises(ValueError, match=r"^megatron\.pin_cpu_grads = False: does nothing without megatron\.optimizer_cpu_offload"):
        check_effect({"pin_cpu_grads": False, "optimizer_cpu_offload": False}, MOE, recompute="none")
    with pytest.raises(ValueError, match=r"^megatron\.recompute_modules: does nothing with actor\.recompute = 'full'; expected selective"):
        check_effect({"recompute_modules": ["mlp"]}, MOE, recompute="full")
    check_effect({"fp8": "hybrid", "fp8_recipe": "delayed", "recompute_modules": ["mlp"]}, MOE, recompute="selective")


@pytest.mark.parametrize("option", ["optimizer_cpu_offload", "bias_dropout_fusion"])
def test_what_needs_cuda_is_refused_on_a_cpu(option: str) -> None:
    with pytest.raises(ValueError, match=rf"^megatron\.{option} = True: needs CUDA, which this machine does not have; remove it$"):
        check_machine_options({option: True}, ON_CPU)
    check_machine_options({option: False}, ON_CPU)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.01},
            "megatron.moe_router_load_balancing_type = 'aux_loss': expected none or seq_aux_loss",
        ),
        ({"moe_aux_loss_coeff": 0.01}, "megatron.moe_aux_loss_coeff = 0.01 with moe_router_load_balancing_type = 'none': expected both"),
        ({"moe_router_load_balancing_type": "seq_aux_loss"}, "megatron.moe_aux_loss_coeff = 0.0 with moe_router_load_balancing_type"),
        ({"moe_z_loss_coeff": 0.001}, "megatron.moe_z_loss_coeff = 0.001: it would be summed over tokens without a denominator; remove it"),
        ({"moe_expert_capacity_factor": 0.5}, "megatron.moe_expert_capacity_factor = 0.5: which tokens are dropped would change with"),
        ({"moe_input_jitter_eps": 0.1}, "megatron.moe_input_jitter_eps = 0.1: the same tokens would have other log-probs in every pass"),
        ({"moe_router_enable_expert_bias": True}, "megatron.moe_router_enable_expert_bias = True: a Qwen3 checkpoint has no place"),
        (
            {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.01, "recompute_modules": ["moe"]},
            "megatron.recompute_modules holds 'moe', which cannot be recomputed together with seq_aux_loss",
        ),
        ({"fp8": "hybrid"}, "megatron.fp8 = 'hybrid': needs TransformerEngine on CUDA, here is the local layer spec"),
        ({"moe_token_dispatcher_type": "flex"}, "megatron.moe_token_dispatcher_type = 'flex': needs CUDA and DeepEP"),
    ],
)
def test_an_option_that_would_give_wrong_numbers_or_none_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError) as refusal:
        build(**options)
    assert str(refusal.value).startswith(message)


def test_expert_weights_are_renormalised_exactly_when_the_model_says_so() -> None:
    # Softmax over the chosen logits is softmax over all, renormalised over the chosen; softmax before choosing is not.
    assert build(dataclasses.replace(MOE, norm_topk_prob=True)).moe_router_pre_softmax is False
    assert build(dataclasses.replace(MOE, norm_topk_prob=False)).moe_router_pre_softmax is True


def test_a_dense_model_has_no_experts() -> None:
    dense = dataclasses.replace(
        MOE, model_type="qwen3", num_experts=None, num_experts_per_tok=None, moe_intermediate_size=None, norm_topk_prob=None
    )
    assert build(dense).num_moe_experts is None


def test_recomputation_is_what_was_asked_for() -> None:
    granularity = {name: build(recompute=name).recompute_granularity for name in ("none", "selective", "full")}
    assert granularity == {"none": None, "selective": "selective", "full": "full"}


@pytest.mark.parametrize(
    ("layout", "batched", "variable"),
    [
        ({"world_size": 1}, True, False),
        ({"world_size": 2, "pp": 2}, True, True),
        ({"world_size": 2, "pp": 2, "vpp": 2}, False, True),
    ],
)
def test_the_interleaved_schedule_never_batches_its_messages(layout: dict, batched: bool, variable: bool) -> None:
    config = build(layout=layout)
    assert (config.batch_p2p_comm, config.overlap_p2p_comm, config.variable_seq_lengths) == (batched, not batched, variable)


@pytest.mark.parametrize("name", ["batch_p2p_comm", "overlap_p2p_comm", "variable_seq_lengths", "recompute_granularity"])
def test_what_keeps_pipelines_right_cannot_be_set(name: str) -> None:
    # Virtual stages with batched messages give wrong numbers, silently.
    with pytest.raises(ValueError, match=rf"^megatron\.{name}: decided by the layout, the model or the actor"):
        build(layout={"world_size": 2, "pp": 2, "vpp": 2}, recompute="full", **{name: True})


def test_overlap_of_weights_needs_overlap_of_gradients() -> None:
    with pytest.raises(
        ValueError, match=r"^megatron\.overlap_param_gather = True: expected megatron\.overlap_grad_reduce = true beside it$"
    ):
        data_parallel_config({"overlap_param_gather": True})
    config = data_parallel_config({"overlap_param_gather": True, "overlap_grad_reduce": True, "bucket_size": 1000})
    assert (config.overlap_param_gather, config.overlap_grad_reduce, config.bucket_size) == (True, True, 1000)
    assert (config.use_distributed_optimizer, config.grad_reduce_in_fp32) == (True, True)


def test_options_of_model_optimizer_and_overlap_pass_the_check_of_names() -> None:
    check_option_names({"moe_router_dtype": "fp32", "overlap_cpu_optimizer_d2h_h2d": True, "overlap_grad_reduce": True, "bucket_size": 10})
    with pytest.raises(ValueError, match=r"^megatron\.overlap_grad_reducee: .* did you mean 'overlap_grad_reduce'"):
        check_option_names({"overlap_grad_reducee": True})


def test_what_the_actor_cannot_honour_is_known_before_any_process_starts() -> None:
    with pytest.raises(ValueError, match=r"^megatron\.moe_z_loss_coeff = 0\.1"):
        check_option_names({"moe_z_loss_coeff": 0.1})
    with pytest.raises(ValueError, match=r"^megatron\.overlap_param_gather = True"):
        check_option_names({"overlap_param_gather": True})


def test_optimizer_options_are_checked_alike() -> None:
    settings = OptimizerSettings(weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8, gradient_clip=1.0)
    with pytest.raises(ValueError, match=r"^megatron\.clip_grad: decided .*\(here 1\.0\); remove it$"):
        build_optimizer([], settings, dtype=torch.float32, options={"clip_grad": 2.0})
