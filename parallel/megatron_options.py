"""Options under `megatron:`. Options in the list below are known to be harmless and accepted. Any other option is an error with a reason.

Harmless means: the model that is trained stays the model that samples and is exported, up to rounding. Megatron-Core has options that
change the model without an error, and options that this project's layers never read. A new option is therefore an error until
its code has been read. `model_check.py` compares the built model with a plain forward pass, whatever this list says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from checkpoints_convert.mapping import Architecture
from checkpoints_convert.nearest_name import did_you_mean
from parallel.capabilities import Capabilities


class Machine(Enum):
    """Where an option has an effect."""

    ANY = "any machine"
    CUDA = "CUDA"
    ENGINE = "TransformerEngine on CUDA"


@dataclass(frozen=True, slots=True, kw_only=True)
class Harmless:
    """machine: what the option needs. beside: another option without which it does nothing."""

    machine: Machine = Machine.ANY
    beside: str | None = None


_ANYWHERE = Harmless()
_CUDA = Harmless(machine=Machine.CUDA)
_ENGINE = Harmless(machine=Machine.ENGINE)
_FLEX = Harmless(machine=Machine.CUDA, beside="moe_token_dispatcher_type")
_OFFLOADED = Harmless(machine=Machine.CUDA, beside="optimizer_cpu_offload")
_PRECISION_AWARE = Harmless(machine=Machine.ENGINE, beside="use_precision_aware_optimizer")
_CPU_OFFLOADING = Harmless(machine=Machine.ENGINE, beside="cpu_offloading")
_FP8 = Harmless(machine=Machine.ENGINE, beside="fp8")

HARMLESS: Mapping[str, Harmless] = {
    # Communication and schedule.
    "overlap_grad_reduce": _ANYWHERE,
    "overlap_param_gather": _ANYWHERE,
    "bucket_size": _ANYWHERE,
    "batch_p2p_sync": _ANYWHERE,
    "deallocate_pipeline_outputs": _ANYWHERE,
    "cp_comm_type": _ENGINE,
    # Experts: how tokens travel and in which precision the router computes. layers/router.py checks the balance loss.
    "moe_aux_loss_coeff": _ANYWHERE,
    "moe_router_load_balancing_type": _ANYWHERE,
    "moe_router_dtype": _ANYWHERE,
    "moe_token_dispatcher_type": _ANYWHERE,
    "moe_flex_dispatcher_backend": _FLEX,
    "moe_enable_deepep": _FLEX,
    "moe_deepep_num_sms": _FLEX,
    "moe_hybridep_num_sms": _FLEX,
    "moe_permute_fusion": _ENGINE,
    "moe_router_fusion": _ENGINE,
    "moe_router_padding_for_fp8": _FP8,
    "moe_router_padding_for_quantization": _ENGINE,
    # Memory.
    "moe_layer_recompute": _ANYWHERE,
    "recompute_modules": _ANYWHERE,
    "clone_scatter_output_in_embedding": _ANYWHERE,
    "disable_parameter_transpose_cache": _ENGINE,
    "cpu_offloading": _ENGINE,
    "cpu_offloading_num_layers": _CPU_OFFLOADING,
    "cpu_offloading_activations": _CPU_OFFLOADING,
    "cpu_offloading_weights": _CPU_OFFLOADING,
    "cpu_offloading_double_buffering": _CPU_OFFLOADING,
    # Kernels and precision.
    "deterministic_mode": _ANYWHERE,
    "batch_invariant_mode": _ENGINE,
    "disable_bf16_reduced_precision_matmul": _CUDA,
    "apply_rope_fusion": _ENGINE,
    "bias_activation_fusion": _CUDA,
    "bias_dropout_fusion": _CUDA,
    "masked_softmax_fusion": _CUDA,
    "use_te_activation_func": _ENGINE,
    "fp8": _ENGINE,
    "fp8_recipe": _FP8,
    "fp8_margin": _FP8,
    "fp8_interval": _FP8,
    "fp8_amax_history_len": _FP8,
    "fp8_amax_compute_algo": _FP8,
    "fp8_wgrad": _FP8,
    "fp8_dot_product_attention": _FP8,
    "fp8_multi_head_attention": _FP8,
    "tp_only_amax_red": _FP8,
    "first_last_layers_bf16": _FP8,
    "num_layers_at_start_in_bf16": _FP8,
    "num_layers_at_end_in_bf16": _FP8,
    "fp4": _ENGINE,
    "fp4_recipe": Harmless(machine=Machine.ENGINE, beside="fp4"),
    # Where the optimizer keeps its state.
    "optimizer_cpu_offload": _CUDA,
    "optimizer_offload_fraction": _OFFLOADED,
    "overlap_cpu_optimizer_d2h_h2d": _OFFLOADED,
    "pin_cpu_grads": _OFFLOADED,
    "pin_cpu_params": _OFFLOADED,
    "use_torch_optimizer_for_cpu_offload": _OFFLOADED,
    "use_precision_aware_optimizer": _ENGINE,
    "store_param_remainders": _PRECISION_AWARE,
}

_UNREAD = "it is not checked that the trained model stays the one that samples and is exported"
_ANOTHER_MODEL = "the servers and the export know no such part, so another model would be trained"
_OTHER_EXPERTS = "experts would be chosen or weighted otherwise than by the servers and in the export"
_NO_EFFECT = "it does nothing here"
_ADAMW = "the optimizer is AdamW as actor.optimizer describes it"
_VARYING_LENGTHS = "packed micro-batches differ in length, and a recorded graph needs one"
_OWN_HEAD = "the output layer is computed by this project, which would leave its gradient out"
_INFERENCE = "it is for inference with Megatron-Core"

# Why an option is an error: whole names first, then prefixes.
REASONS: Mapping[str, str] = {
    "add_qkv_bias": _ANOTHER_MODEL,
    "apply_wd_to_qk_layernorm": _ADAMW,
    "attention_backend": "a configuration file cannot hold its value; set NVTE_FLASH_ATTN, NVTE_FUSED_ATTN and NVTE_UNFUSED_ATTN instead",
    "attention_softmax_in_fp32": _NO_EFFECT,
    "cross_entropy_loss_fusion": _NO_EFFECT,
    "decoupled_weight_decay": "without it weight decay is a part of the gradient, which is Adam and no longer AdamW",
    "defer_embedding_wgrad_compute": _OWN_HEAD,
    "delay_wgrad_compute": "gradients of the weights would be left out: nothing here asks for them later",
    "enable_cuda_graph": _VARYING_LENGTHS,
    "external_cuda_graph": _VARYING_LENGTHS,
    "flash_decode": _INFERENCE,
    "fp32_residual_connection": "the servers add residuals in the model's dtype",
    "fp4_param": "weights are loaded, exported and published in the model's dtype",
    "fp8_param": "weights are loaded, exported and published in the model's dtype",
    "heterogeneous_block_specs": _ANOTHER_MODEL,
    "init_method_std": "weights come from model.path",
    "is_hybrid_model": _ANOTHER_MODEL,
    "moe_enable_routing_replay": "Megatron-Core's own replay is not used; set actor.routing_replay instead",
    "moe_expert_capacity_factor": "which tokens are dropped would change with the way they are packed into micro-batches",
    "moe_input_jitter_eps": "the same tokens would have other log-probs in every pass",
    "moe_latent_size": _ANOTHER_MODEL,
    "moe_layer_freq": "all layers of this model are alike, so it does nothing here",
    "moe_pad_expert_input_to_capacity": "it needs moe_expert_capacity_factor, which drops tokens",
    "moe_per_layer_logging": _NO_EFFECT,
    "moe_router_bias_update_rate": "a Qwen3 checkpoint has no place for the bias",
    "moe_router_enable_expert_bias": "a Qwen3 checkpoint has no place for the bias",
    "moe_router_force_load_balancing": "every token would go to random experts, to other ones in every pass",
    "moe_router_group_topk": _OTHER_EXPERTS,
    "moe_router_num_groups": _OTHER_EXPERTS,
    "moe_router_topk_limited_devices": _OTHER_EXPERTS,
    "moe_router_topk_scaling_factor": _OTHER_EXPERTS,
    "moe_token_drop_policy": "no token is dropped here",
    "moe_token_dropping": "which tokens are dropped would change with the way they are packed into micro-batches",
    "moe_z_loss_coeff": "it would be summed over tokens without a denominator",
    "mlp_chunks_for_prefill": _INFERENCE,
    "mrope_section": _ANOTHER_MODEL,
    "multi_latent_attention": _ANOTHER_MODEL,
    "overlap_moe_expert_parallel_comm": _OWN_HEAD,
    "quant_recipe": _ANOTHER_MODEL,
    "symmetric_ar_type": _INFERENCE,
    "test_mode": _ANOTHER_MODEL,
    "transformer_impl": "the machine decides it (minpro doctor says how)",
    "wgrad_deferral_limit": _OWN_HEAD,
}
_REASONS_BY_BEGINNING: Mapping[str, str] = {
    "cuda_graph_": _VARYING_LENGTHS,
    "dsa_": _ANOTHER_MODEL,
    "experimental_attention": _ANOTHER_MODEL,
    "inference_": _INFERENCE,
    "linear_": _ANOTHER_MODEL,
    "mamba_": _ANOTHER_MODEL,
    "moe_shared_expert_": _ANOTHER_MODEL,
    "mtp_": _ANOTHER_MODEL,
    "muon_": _ADAMW,
    "sgd_": _ADAMW,
    "tp_comm_": "its buffers are not set up here",
    "use_kitchen": _ANOTHER_MODEL,
}


def check_options(options: Mapping[str, Any], known: frozenset[str], fixed: Mapping[str, Any], *, section: str) -> None:
    """Refuse every option that is not known to be harmless.

    Args:
        options: name -> value, as the user gave them.
        known: the options of the installed Megatron-Core.
        fixed: what this project decides itself, with the value.
        section: where the options stand, for the message.

    Raises:
        ValueError: names the option and says why: unknown, with the nearest known one; decided here; or what it would break.
    """
    for name, value in options.items():
        if name not in known:
            raise ValueError(f"{section}.{name}: the installed megatron-core has no such option; {did_you_mean(name, known)}")
        if name in fixed:
            raise ValueError(f"{section}.{name}: decided by the layout, the model or the actor (here {fixed[name]!r}); remove it")
        if name not in HARMLESS:
            raise ValueError(f"{section}.{name} = {value!r}: {reason_against(name)}; remove it")


def reason_against(name: str) -> str:
    """Why an option that is not in HARMLESS is refused."""
    begins = (reason for beginning, reason in _REASONS_BY_BEGINNING.items() if name.startswith(beginning))
    return REASONS[name] if name in REASONS else next(begins, _UNREAD)


def check_machine_options(options: Mapping[str, Any], capabilities: Capabilities) -> None:
    """Raises ValueError for an option that this machine cannot honour, before any process group: nothing is silently left out."""
    for name, value in options.items():
        if not value or name not in HARMLESS:
            continue
        if HARMLESS[name].machine is Machine.ENGINE and capabilities.layer_spec != "transformer_engine":
            raise ValueError(f"megatron.{name} = {value!r}: needs TransformerEngine on CUDA, here is {capabilities.describe_layers()}")
        if HARMLESS[name].machine is Machine.CUDA and capabilities.device_type != "cuda":
            raise ValueError(f"megatron.{name} = {value!r}: needs CUDA, which this machine does not have; remove it")
    if "layernorm" in (options.get("recompute_modules") or ()) and capabilities.layer_spec != "transformer_engine":
        raise ValueError(
            "megatron.recompute_modules holds 'layernorm', which Megatron-Core recomputes with TransformerEngine alone; "
            f"here is {capabilities.describe_layers()}; remove it"
        )
    if options.get("moe_token_dispatcher_type") == "flex" and capabilities.device_type != "cuda":
        raise ValueError("megatron.moe_token_dispatcher_type = 'flex': needs CUDA and DeepEP; expected alltoall or allgather on a CPU")


def check_effect(options: Mapping[str, Any], architecture: Architecture, *, recompute: str) -> None:
    """Refuse an option that would do nothing.

    Args:
        options: name -> value; names as `check_options` lets them pass.
        architecture: the model they are for.
        recompute: actor.recompute.

    Raises:
        ValueError: names the option and what it needs.
    """
    for name, value in options.items():
        if name.startswith("moe_") and not architecture.is_moe:
            raise ValueError(f"megatron.{name} = {value!r}: the model has no experts; remove it")
        beside = HARMLESS[name].beside if name in HARMLESS else None
        if beside is not None and not options.get(beside):
            raise ValueError(f"megatron.{name} = {value!r}: does nothing without megatron.{beside}; set it, or remove this option")
    if options.get("recompute_modules") and recompute != "selective":
        raise ValueError(f"megatron.recompute_modules: does nothing with actor.recompute = {recompute!r}; expected selective there")
