"""Communication of the distributed optimizer behind compute: gradients leave while backward runs, new weights arrive while forward runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from parallel.mcore import DistributedDataParallel, DistributedDataParallelConfig, TransformerConfig
from parallel.model import HiddenStateModel

OVERLAP_FIELDS = frozenset({"overlap_grad_reduce", "overlap_param_gather", "bucket_size"})


def data_parallel_config(options: Mapping[str, Any]) -> DistributedDataParallelConfig:
    """Gradients summed in fp32 over replicas, optimizer state sharded. options: those of OVERLAP_FIELDS; bucket_size in parameters.

    Raises ValueError for the other two without overlap_grad_reduce: Megatron-Core would not offer the one and ignore the other.
    """
    for name in ("overlap_param_gather", "bucket_size"):
        if options.get(name) and not options.get("overlap_grad_reduce"):
            raise ValueError(f"megatron.{name} = {options[name]!r}: expected megatron.overlap_grad_reduce = true beside it")
    return DistributedDataParallelConfig(
        use_distributed_optimizer=True, grad_reduce_in_fp32=True, check_for_nan_in_grad=False, **dict(options)
    )


def connect(config: TransformerConfig, chunks: Sequence[DistributedDataParallel], modules: Sequence[HiddenStateModel]) -> None:
    """Tell the schedule when gradients are complete, and let forward wait for the weights that it is about to use.

    Megatron-Core waits where a module is called that owns a parameter. Plug-ins read parameters of their submodules, and the output
    layer is never called at all: so every layer, and the head, waits for everything inside it.
    """
    if chunks[0].ddp_config.overlap_grad_reduce:
        config.no_sync_func = [chunk.no_sync for chunk in chunks] if len(chunks) > 1 else chunks[0].no_sync
    if not chunks[0].ddp_config.overlap_param_gather:
        return
    for chunk, module in zip(chunks, modules, strict=True):
        for layer in module.decoder.layers:
            layer.register_forward_pre_hook(lambda layer, _, chunk=chunk: _wait(chunk, layer.parameters()))
        if module.post_process:
            module.register_forward_hook(lambda module, *_, chunk=chunk: _wait(chunk, [module.head_weight()]))


def _wait(chunk: DistributedDataParallel, parameters: Any) -> None:
    for group in dict.fromkeys(chunk.param_to_bucket_group[parameter] for parameter in parameters):
        group.finish_param_sync()


def settle_weights(chunks: Sequence[DistributedDataParallel]) -> None:
    """Collective. Have the latest weights on every rank now: without a forward pass nothing else fetches them."""
    if chunks[0].ddp_config.overlap_param_gather:
        for chunk in chunks:
            chunk.start_param_sync(force_sync=True)
