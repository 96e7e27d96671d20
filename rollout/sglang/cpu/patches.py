"""Patches for the unmodified sglang wheel on a machine without a GPU. Written for sglang 0.5.23.

what                          why
sgl_kernel                    its CPU kernels are not published as a wheel; torch.ops.sgl_kernel stays empty, so layers take their
                              plain-torch path
torchvision, scipy            serve models with images and sound; they take 1.6 and 1.2 s, and torchvision's default wheel is a CUDA build
torch.compile                 SGLang decorates 56 small functions for other devices, transformers marks some for the compiler, and imports
                              torch's symbolic shapes; the compiler takes 0.7 s to import, the shapes with sympy 0.5 s
host buffers                  are pinned through cudart; plain memory serves on a CPU
batched attention             SGLang loops over the sequences of a batch (kernels.py)
seeded sampling               SGLang honours a request's seed only in its deterministic mode, which needs GPU kernels
sleeping while paused         a paused scheduler polls without end; the trainer needs that core
stopping                      SGLang looks at its SIGTERM flag every 5 s
fork instead of spawn         children would spend as long importing as the parent did (each 7 s of CPU time)
keys in the log               SGLang prints its server arguments with both keys in clear
freed memory                  stays with the process (freed_memory.py)
garbage collection            is off until the children are forked: it takes a quarter of the imports' time and finds nothing
model registry                only the Qwen3 family is imported; the others cost seconds and print import errors
"""

from __future__ import annotations

import asyncio
import gc
import importlib.machinery
import sys
import types
from typing import Any

from rollout.deferred_module import defer, defer_symbolic_shapes
from rollout.freed_memory import keep_freed_memory
from rollout.sglang.cpu import models


class _StandIn(types.ModuleType):
    """A package that is not there. It has every name that is imported from it, and fails when one is called."""

    __version__ = "0.0.0+standin"
    __path__: list[str] = []  # noqa: RUF012  a package, to the import system

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        sys.modules[name] = self
        package, _, own = name.rpartition(".")
        if package:
            setattr(sys.modules[package], own, self)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*_: Any, **__: Any) -> None:
            raise NotImplementedError(f"{self.__name__}.{name} is not there on a CPU; rollout/sglang/cpu replaces what Qwen3 needs")

        return missing


def _stand_in_for_sgl_kernel() -> None:
    import torch

    def assign_req_to_token_pool_cpu(req_pool_indices: Any, req_to_token: Any, start: Any, end: Any, out_cache_loc: Any, *_: Any) -> None:
        """Write each request's new cache slots into its row, at [start, end)."""
        at = 0
        for row, first, last in zip(req_pool_indices.tolist(), start.tolist(), end.tolist(), strict=True):
            req_to_token[row, first:last] = out_cache_loc[at : at + last - first].to(req_to_token.dtype)
            at += last - first

    _StandIn("sgl_kernel").assign_req_to_token_pool_cpu = assign_req_to_token_pool_cpu  # type: ignore[attr-defined]
    assert not hasattr(torch.ops.sgl_kernel, "convert_weight_packed"), "the real sgl_kernel is loaded: start SGLang without this module"


def _hide_what_takes_long() -> None:
    sys.modules["scipy"] = sys.modules["torchvision"] = None  # type: ignore[assignment]  # Python's way to say that a module is not there
    from transformers.utils import is_scipy_available, is_torchvision_available

    assert not is_scipy_available() and not is_torchvision_available()  # transformers remembers the answer, and does without
    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
        _StandIn(name)


def _compile_nothing() -> None:
    import torch

    def as_it_is(function: Any = None, **_: Any) -> Any:
        """torch.compile without options, and with options: a decorator."""
        return (lambda decorated: decorated) if function is None else function

    torch.compile = torch.compiler.disable = as_it_is  # type: ignore[assignment]
    # transformers imports them at its start, for marks on functions, and nobody uses them who compiles nothing.
    defer_symbolic_shapes()
    defer("torch._dynamo", package=True)
    for mark in ("allow_in_graph", "assume_constant_result", "disable"):
        setattr(sys.modules["torch._dynamo"], mark, as_it_is)
    defer("torch._dynamo._trace_wrapped_higher_order_op", functions=("TransformGetItemToIndex",))


def _use_plain_host_memory() -> None:
    import torch
    from sglang.srt.mem_cache.pool_host import common

    def allocate(dims: Any, dtype: Any, device: str = "cpu", **_: Any) -> Any:
        return torch.empty(dims, dtype=dtype, device=device)

    common.ALLOC_MEMORY_FUNCS["cpu"] = allocate


def _use_batched_attention() -> None:
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    from rollout.sglang.cpu.kernels import decode_attention, extend_attention

    sglang_decode = TorchNativeAttnBackend._run_sdpa_forward_decode
    sglang_extend = TorchNativeAttnBackend._run_sdpa_forward_extend

    def is_plain(encoder_lens: Any, options: dict[str, Any]) -> bool:
        window = options.get("sliding_window_size")
        return encoder_lens is None and not options.get("is_cross_attn") and (window is None or window < 0)

    def decode(
        self: Any,
        query: Any,
        output: Any,
        k_cache: Any,
        v_cache: Any,
        req_to_token: Any,
        req_pool_indices: Any,
        seq_lens: Any,
        encoder_lens: Any = None,
        **options: Any,
    ) -> Any:
        if not is_plain(encoder_lens, options):
            return sglang_decode(self, query, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens, encoder_lens, **options)
        output[:] = decode_attention(
            query,
            k_cache=k_cache,
            v_cache=v_cache,
            req_to_token=req_to_token,
            req_pool_indices_N=req_pool_indices,
            seq_lens_N=seq_lens,
            scaling=options["scaling"],
        )
        return output

    def extend(
        self: Any,
        query: Any,
        output: Any,
        k_cache: Any,
        v_cache: Any,
        req_to_token: Any,
        req_pool_indices: Any,
        seq_lens: Any,
        prefix_lens: Any,
        extend_lens: Any,
        encoder_lens: Any = None,
        **options: Any,
    ) -> Any:
        if not is_plain(encoder_lens, options) or not options.get("causal"):
            return sglang_extend(
                self,
                query,
                output,
                k_cache,
                v_cache,
                req_to_token,
                req_pool_indices,
                seq_lens,
                prefix_lens,
                extend_lens,
                encoder_lens,
                **options,
            )
        output[:] = extend_attention(
            query,
            k_cache=k_cache,
            v_cache=v_cache,
            req_to_token=req_to_token,
            req_pool_indices_N=req_pool_indices,
            seq_lens_N=seq_lens,
            prefix_lens_N=prefix_lens,
            extend_lens_N=extend_lens,
            scaling=options["scaling"],
        )
        return output

    TorchNativeAttnBackend._run_sdpa_forward_decode = decode
    TorchNativeAttnBackend._run_sdpa_forward_extend = extend


def _honour_request_seeds() -> None:
    """Every request draws by its own seed (a random one if it names none), whatever else is in its batch."""
    import torch
    from sglang.srt.layers import sampler
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

    from rollout.sglang.cpu.kernels import seeded_multinomial

    from_schedule_batch = SamplingBatchInfo.from_schedule_batch.__func__

    def with_seeds(cls: Any, batch: Any, *arguments: Any, **options: Any) -> Any:
        info = from_schedule_batch(cls, batch, *arguments, **options)
        for request in batch.reqs:
            if request.sampling_params.sampling_seed is None:
                request.sampling_params.sampling_seed = int(torch.randint(2**31, (1,)))
        info.sampling_seed = torch.tensor([request.sampling_params.sampling_seed for request in batch.reqs], dtype=torch.int64)
        return info

    SamplingBatchInfo.from_schedule_batch = classmethod(with_seeds)

    def from_probs(probs: Any, sampling_seed: Any = None, positions: Any = None) -> Any:
        return seeded_multinomial(probs, sampling_seed, positions).view(-1).to(torch.int32)

    def from_logprobs(logprobs: Any, seed: Any, positions: Any) -> Any:
        return seeded_multinomial(logprobs.exp(), seed, positions)

    sampler.sampling_from_probs_torch = from_probs
    sampler.multinomial_with_seed = from_logprobs


def _sleep_while_paused() -> None:
    from sglang.srt.managers.scheduler import Scheduler

    record_state = Scheduler._record_scheduler_state_for_paused_engine

    def record_and_sleep(self: Any) -> None:
        record_state(self)
        if self.idle_sleeper is not None:
            self.idle_sleeper.poller.poll(100)  # ms; a message ends it at once

    Scheduler._record_scheduler_state_for_paused_engine = record_and_sleep


def _stop_promptly() -> None:
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

    watchdog = TokenizerManager.sigterm_watchdog

    async def prompt_watchdog(self: Any) -> None:
        while not self.gracefully_exit:
            await asyncio.sleep(0.1)
        await watchdog(self)  # its own loop over the same flag, with 5 s steps, is then over at once

    TokenizerManager.sigterm_watchdog = prompt_watchdog


def _fork_children() -> None:
    """Start scheduler and detokenizer by fork, from a parent that has imported everything and runs no threads yet."""
    import multiprocessing

    import sglang.srt.managers.detokenizer_manager
    import sglang.srt.managers.scheduler  # noqa: F401
    from sglang.srt.entrypoints import engine

    set_envs_and_config = engine._set_envs_and_config

    def set_and_fork(*arguments: Any, **options: Any) -> None:
        set_envs_and_config(*arguments, **options)
        multiprocessing.set_start_method("fork", force=True)
        gc.freeze()  # what is imported lives for ever: children need not look at it, nor copy its pages
        gc.enable()

    engine._set_envs_and_config = set_and_fork


def _keep_keys_out_of_the_log() -> None:
    from sglang.srt.entrypoints import engine

    for_logging = engine._server_args_for_logging

    def without_keys(server_args: Any) -> dict[str, Any]:
        return {
            name: "[redacted]" if name in ("api_key", "admin_api_key") and value is not None else value
            for name, value in for_logging(server_args).items()
        }

    engine._server_args_for_logging = without_keys


def _import_only_qwen3() -> None:
    from sglang.srt.environ import envs

    envs.SGLANG_EXTERNAL_MODEL_PACKAGE.set(models.__name__)  # read when the registry is imported
    import sglang.srt.models.registry  # noqa: F401  here, so that a child finds it imported


def apply() -> None:
    """Apply all patches, in the order in which SGLang's modules need them. Idempotent."""
    if "sgl_kernel" in sys.modules:
        return
    gc.disable()
    keep_freed_memory()
    _stand_in_for_sgl_kernel()
    _hide_what_takes_long()
    _compile_nothing()
    _use_plain_host_memory()
    _use_batched_attention()
    _honour_request_seeds()
    _sleep_while_paused()
    _stop_promptly()
    _fork_children()
    _keep_keys_out_of_the_log()
    _import_only_qwen3()
