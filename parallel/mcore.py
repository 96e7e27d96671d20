"""The one door to Megatron-Core: every name this project uses of it, imported after the CPU hook is in place."""

from __future__ import annotations

import warnings

from parallel import (
    cpu,
    torch_checkpoint,  # noqa: F401  Megatron-Core imports torch's checkpoints too
)
from parallel.engine_import import import_engine
from parallel.hidden_packages import hide_unusable
from parallel.skipped_import import skipped_import

# Megatron-Core warns at import about TransformerEngine and Apex; `minpro doctor` and the log say it once, in our words.
warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex).*", module=r"megatron\.core\..*")
import_engine()  # one that does not import is hidden from what follows
hide_unusable()
# Megatron-Core's inference engine, which nothing here uses, logs to wandb where that is installed: half a second in every rank.
with skipped_import("wandb"):
    cpu.install()
    import megatron.core  # noqa: F401

from megatron.core import __version__ as version
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group

from parallel import megatron_gaps, token_permutation

megatron_gaps.close()
token_permutation.install()

__all__ = [
    "ColumnParallelLinear",
    "DistributedDataParallel",
    "DistributedDataParallelConfig",
    "Float16Module",
    "GPTModel",
    "HybridDeviceOptimizer",
    "MCoreSavePlanner",
    "MLPSubmodules",
    "MoEAuxLossAutoScaler",
    "ModuleSpec",
    "OptimizerConfig",
    "P2PCommunicator",
    "PackedSeqParams",
    "RowParallelLinear",
    "SequentialMLP",
    "ShardedTensor",
    "TopKRouter",
    "TorchDistSaveShardedStrategy",
    "TransformerBlockSubmodules",
    "TransformerConfig",
    "_replace_state_dict_keys_with_sharded_keys",
    "clip_grad_by_total_norm_fp32",
    "copy_to_tensor_model_parallel_region",
    "dist_checkpointing",
    "ensure_metadata_has_dp_cp_group",
    "finalize_model_grads",
    "gather_from_sequence_parallel_region",
    "get_forward_backward_func",
    "get_gpt_layer_local_spec",
    "get_gpt_layer_with_transformer_engine_spec",
    "get_megatron_optimizer",
    "get_standard_config_overrides",
    "mcore_to_pyt_state_dict",
    "model_parallel_cuda_manual_seed",
    "parallel_state",
    "set_tensor_model_parallel_attributes",
    "version",
    "weighted_bias_swiglu_impl",
]
