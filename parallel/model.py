"""Hugging Face architecture -> this rank's Megatron-Core GPTModel, ending in hidden states instead of logits.

The output layer's product with the vocabulary is the largest tensor of an RL step; `logprobs.py` computes what the loss
needs of it in chunks, so the model must hand out what goes into that layer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoints_convert.mapping import Architecture
from parallel.capabilities import Capabilities
from parallel.layers.attention import PackedAttention
from parallel.layers.experts import PackedExperts
from parallel.layers.norm import RMSNorm
from parallel.layers.router import SequenceBalancedRouter, check_router_options, follow_packing
from parallel.layout import ParallelLayout
from parallel.mcore import (
    ColumnParallelLinear,
    GPTModel,
    MLPSubmodules,
    ModuleSpec,
    RowParallelLinear,
    TransformerBlockSubmodules,
    TransformerConfig,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
    parallel_state,
)
from parallel.megatron_options import check_machine_options, check_options
from parallel.stages import Chunk

# What Qwen3 does not have. Each of these makes another model, and this project's layers would silently ignore some of them.
ABSENT_FROM_QWEN3: Mapping[str, Any] = {
    "apply_query_key_layer_scaling": False,
    "apply_residual_connection_post_layernorm": False,
    "attention_output_gate": False,
    "layernorm_zero_centered_gamma": False,
    "mtp_num_layers": None,
    "no_rope_freq": None,
    "qk_clip": False,
    "qk_l2_norm": False,
    "rotary_interleaved": False,
    "softmax_scale": None,
    "softmax_type": "vanilla",
    "window_size": None,
}

_MANY_EXPERTS = 32  # from here on Megatron-Core warns of a router in 16 bits

TRANSFORMER_FIELDS = frozenset(field.name for field in dataclasses.fields(TransformerConfig))


def transformer_config(
    architecture: Architecture,
    layout: ParallelLayout,
    capabilities: Capabilities,
    *,
    dtype: torch.dtype,
    recompute: str,
    options: Mapping[str, Any],
) -> TransformerConfig:
    """Megatron's model configuration.

    Args:
        architecture: the model.
        layout: how it is spread over ranks.
        capabilities: what this machine has.
        dtype: of parameters and activations.
        recompute: "none", "selective" (core attention) or "full" (every layer).
        options: what the user sets besides; see megatron_options.py.

    Raises:
        ValueError: names an option that is unknown, decided here or not known to be harmless, or that this machine cannot honour.
    """
    a = architecture
    on_cpu = capabilities.device_type == "cpu"
    fixed: dict[str, Any] = {
        **ABSENT_FROM_QWEN3,
        "num_layers": a.num_hidden_layers,
        "hidden_size": a.hidden_size,
        "ffn_hidden_size": a.intermediate_size,
        "num_attention_heads": a.num_attention_heads,
        "num_query_groups": a.num_key_value_heads,
        "kv_channels": a.head_dim,
        "qk_layernorm": True,
        "normalization": "RMSNorm",
        "layernorm_epsilon": a.rms_norm_eps,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": False,
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp,
        "account_for_embedding_in_pipeline_split": layout.count_embedding_as_layer,
        "account_for_loss_in_pipeline_split": layout.count_loss_as_layer,
        # Sizes of the ends are handed over as a list: 0.16.1 divides by zero where virtual stages have no rank between the ends.
        "num_layers_in_first_pipeline_stage": None,
        "num_layers_in_last_pipeline_stage": None,
        "pipeline_model_parallel_layout": _listed(layout.chunks(a.num_hidden_layers)) if layout.names_sizes else None,
        "context_parallel_size": layout.cp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
        "sequence_parallel": layout.sequence_parallel,
        # Packed micro-batches differ in length, so stages tell each other the shape.
        "variable_seq_lengths": layout.pp > 1,
        # The interleaved schedule gives wrong numbers, silently, with batched point-to-point communication.
        "batch_p2p_comm": layout.vpp is None,
        "overlap_p2p_comm": layout.vpp is not None,
        # The loss already carries its global denominator: Megatron must neither average over ranks nor over micro-batches.
        "calculate_per_token_loss": True,
        # TransformerEngine's linear layers do it by themselves, Megatron-Core's with Apex's kernels or weight_gradient.py.
        "gradient_accumulation_fusion": True,
        # Parameters come from a checkpoint; random numbers need no GPU.
        "use_cpu_initialization": True,
        "perform_initialization": False,
    }
    if a.num_experts is not None:
        fixed |= {
            "num_moe_experts": a.num_experts,
            "moe_router_topk": a.num_experts_per_tok,
            "moe_ffn_hidden_size": a.moe_intermediate_size,
            "moe_router_score_function": "softmax",
            # Softmax over the chosen experts only equals softmax over all, renormalised: Qwen3's norm_topk_prob.
            "moe_router_pre_softmax": not a.norm_topk_prob,
            "moe_grouped_gemm": capabilities.layer_spec == "transformer_engine",
            # What Qwen3's experts do not have and `PackedExperts` does not compute.
            "moe_apply_probs_on_input": False,
            "activation_func_clamp_value": None,
            "glu_linear_offset": 0.0,
        }
    if recompute == "full":
        fixed |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif recompute == "selective":
        fixed |= {"recompute_granularity": "selective"}
    if on_cpu:  # fused kernels are CUDA
        fixed |= dict.fromkeys(
            (
                "masked_softmax_fusion",
                "bias_activation_fusion",
                "bias_dropout_fusion",
                "persist_layer_norm",
                "apply_rope_fusion",
            ),
            False,
        )
    else:
        fixed["persist_layer_norm"] = False
    check_options(options, TRANSFORMER_FIELDS, fixed, section="megatron")
    check_router_options(options)
    check_machine_options(options, capabilities)
    defaults = {
        "moe_router_load_balancing_type": "none",
        # Where no token travels, the allgather dispatcher copies them less often; Megatron refuses it for pipelines of varying lengths.
        "moe_token_dispatcher_type": "allgather" if layout.ep * layout.etp * layout.pp == 1 else "alltoall",
        "moe_aux_loss_coeff": 0.0,
        "moe_router_dtype": router_dtype(architecture),
        # Megatron waits for the device after every exchange between stages, because of a fault of torch that was mended long ago.
        "batch_p2p_sync": False,
        # The embedding's gradient on CUDA is summed in any order, without an error. On a CPU it always has one order.
        "deterministic_mode": not on_cpu and torch.are_deterministic_algorithms_enabled(),
        **engine_kernels(architecture, capabilities),
    }
    return TransformerConfig(**{**defaults, **fixed, **options})


def router_dtype(architecture: Architecture) -> str | None:
    """In what the router computes unless `megatron.moe_router_dtype` says otherwise; None: in the model's dtype.

    With many experts neighbouring logits are closer than bf16's steps, and rounding would choose between them.
    """
    return "fp32" if architecture.num_experts is not None and architecture.num_experts >= _MANY_EXPERTS else None


def engine_kernels(architecture: Architecture, capabilities: Capabilities) -> dict[str, Any]:
    """Options that TransformerEngine's layers run faster with: one kernel for the rotary embedding, one to sort tokens by expert."""
    if capabilities.layer_spec == "local":
        return {}
    return {"apply_rope_fusion": True} | ({"moe_permute_fusion": True} if architecture.is_moe else {})


def _listed(chunks: Sequence[Chunk]) -> list[list[str]]:
    """Megatron-Core's list of what every chunk holds."""
    return [["embedding"] * chunk.embeds + ["decoder"] * chunk.num_layers + ["loss"] * chunk.ends for chunk in chunks]


class HiddenStateModel(GPTModel):
    """GPTModel whose last stage returns the output layer's input: [T/(tp if sequence parallel), 1, hidden]."""

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states

    def head_weight(self) -> Tensor:
        """This rank's rows of the output layer, [vocab/tp, hidden]; the embedding's when tied. Last stage only."""
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else self.output_layer.weight
        assert weight is not None
        return weight

    def head_input(self, hidden_states: Tensor) -> Tensor:
        """Hidden states of all local tokens, [T, hidden], on every tensor-parallel rank; backward sums over those ranks."""
        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=True, group=self.pg_collection.tp
            )
        else:
            hidden_states = copy_to_tensor_model_parallel_region(hidden_states, group=self.pg_collection.tp)
        return hidden_states.squeeze(1).to(self.head_weight().dtype)


def _local_layer_spec(architecture: Architecture, capabilities: Capabilities, *, dtype: torch.dtype) -> Any:
    spec = get_gpt_layer_local_spec(
        num_experts=architecture.num_experts, moe_grouped_gemm=False, qk_layernorm=True, normalization="RMSNorm"
    )
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    attention = spec.submodules.self_attention.submodules
    attention.q_layernorm = attention.k_layernorm = RMSNorm
    attention.core_attention = ModuleSpec(
        module=PackedAttention, params={"rotary_base": architecture.rope_theta, "product": capabilities.attention_product(dtype)}
    )
    if architecture.is_moe:
        moe = _moe_submodules(spec)
        moe.router = SequenceBalancedRouter
        moe.experts = ModuleSpec(
            module=PackedExperts,
            params={"product": capabilities.expert_product(dtype)},
            submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
        )
    return spec


def _transformer_engine_layer_spec(architecture: Architecture) -> Any:
    """Megatron-Core's own, norms fused into linear layers and experts in one grouped product; only the router is this project's."""
    spec = get_gpt_layer_with_transformer_engine_spec(num_experts=architecture.num_experts, moe_grouped_gemm=True, qk_layernorm=True)
    if architecture.is_moe:
        _moe_submodules(spec).router = SequenceBalancedRouter
    return spec


def _moe_submodules(spec: Any) -> Any:
    mlp = spec.submodules.mlp
    return mlp.keywords["submodules"] if isinstance(mlp, functools.partial) else mlp.submodules  # a partial since 0.17


def build_model_chunks(
    architecture: Architecture, layout: ParallelLayout, config: TransformerConfig, capabilities: Capabilities
) -> list[HiddenStateModel]:
    """This rank's model chunks, one per virtual pipeline stage (one without), uninitialised. Needs Megatron's process groups."""
    chunks = []
    with_engine = capabilities.layer_spec == "transformer_engine"
    if with_engine:
        layer_spec = _transformer_engine_layer_spec(architecture)
    else:
        layer_spec = _local_layer_spec(architecture, capabilities, dtype=config.params_dtype)
    for index, part in enumerate(layout.chunks_of_rank(architecture.num_hidden_layers, parallel_state.get_pipeline_model_parallel_rank())):
        vp_stage = index if layout.vpp is not None else None
        chunk = HiddenStateModel(
            config=config,
            transformer_layer_spec=TransformerBlockSubmodules(layer_specs=[layer_spec] * part.num_layers, layer_norm=RMSNorm),
            vocab_size=architecture.vocab_size,
            max_sequence_length=architecture.max_position_embeddings,
            pre_process=part.embeds,
            post_process=part.ends,
            parallel_output=True,
            share_embeddings_and_output_weights=architecture.tie_word_embeddings,
            position_embedding_type="rope" if with_engine else "none",  # `PackedAttention` applies it itself
            rotary_base=architecture.rope_theta,
            vp_stage=vp_stage,
        )
        numbers = [layer.layer_number - 1 for layer in chunk.decoder.layers]
        assert numbers == list(range(part.first, part.last)), f"Megatron-Core numbers its layers {numbers}, expected {part}"
        for name, parameter in chunk.named_parameters():
            if ".experts." in name:
                # 0.16.1 reduces expert gradients as dense ones when ep=1 and etp != tp: right logits, wrong gradients.
                parameter.allreduce = False
        follow_packing(chunk)
        chunks.append(chunk.to(capabilities.device_type))
    return chunks
