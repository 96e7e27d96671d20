"""One rank's life in phases: build, load, keep, score, update, capture a checkpoint, export. Each is measured by itself."""

from __future__ import annotations

import gc
import importlib
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints_convert.mapping import hf_shapes
from parallel import process_groups
from parallel.actor import ActorSettings, LearningRate, LossFunction, MegatronActor, TokenFunction, UpdateReport
from parallel.capabilities import detect
from parallel.model_check import ModelCheck, check_model
from parallel.optimizer import inner_optimizers
from parallel.packing import MicroBatch, TokenSequence
from parallel.process_groups import ProcessGroups
from parallel.rehearsal import ledger_kinds, other_ranks, saved_parameters
from parallel.rehearsal.call_site import raised_at
from parallel.rehearsal.fake_device import FakeDevice
from parallel.rehearsal.faults import DeviceFault, NotRehearsable
from parallel.rehearsal.groups import FakeGroups
from parallel.rehearsal.ledger import MemoryLedger, PhaseMemory
from parallel.rehearsal.request import RehearsalRequest
from parallel.rehearsal.result import Collective, Fault, Occurrence, PhaseResult, RehearsalResult
from parallel.rehearsal.tally import Tally
from parallel.sequence_shard import SequenceShard
from parallel.top_tokens import ScoredTopTokens, even_top_tokens

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_SEED, _TIMEOUT_S, _LEARNING_RATE = 0, 600.0, 1e-6
_PROBE_TOKENS = 4  # of the check of the built model; a run gives it hundreds, which would need no more memory but many minutes here
_HOLDERS = 40  # of a phase, in the record


class _RehearsedActor(MegatronActor):
    """The actor as it is. It only says how long its micro-batches are before it runs them, and what the rank that speaks would announce."""

    def __init__(self, *arguments: Any, announce: Callable[[list[int]], None], hear: Callable[[Any], None]) -> None:
        super().__init__(*arguments)
        self._announce = announce
        self._hear = hear

    def update(self, minibatch: Sequence[TokenSequence], loss_fn: LossFunction, *, learning_rate: LearningRate) -> UpdateReport:
        loss, metrics = loss_fn(**two_tokens(minibatch[0]))
        self._hear(sorted((name, value.shape) for name, value in {"loss": loss, **metrics}.items()))
        return super().update(minibatch, loss_fn, learning_rate=learning_rate)

    def sum_statistics(self, minibatch: Sequence[TokenSequence], statistics_fn: TokenFunction[Tensor]) -> Tensor:
        self._hear([("statistics", statistics_fn(**two_tokens(minibatch[0])).shape)])
        return super().sum_statistics(minibatch, statistics_fn)

    def _run(self, micro_batches: list[MicroBatch], finish: Any, *, forward_only: bool) -> None:
        self._announce([micro_batch.shard.num_local_tokens for micro_batch in micro_batches])
        super()._run(micro_batches, finish, forward_only=forward_only)


def two_tokens(sequence: TokenSequence) -> dict[str, Any]:
    """What a TokenFunction is given, for two real tokens on the CPU: what it returns says what it returns for others."""
    shard = SequenceShard.zigzag([2], 0, 1, None, device=torch.device("cpu"))
    return {
        "logprobs_T": torch.zeros(2, requires_grad=True),
        "entropy_T": torch.zeros(2),
        "loss_mask_T": torch.ones(2, dtype=torch.bool),
        "streams": {name: torch.zeros(2) for name in sequence.streams},
        "top": None if sequence.top is None else ScoredTopTokens(logprobs_TK=torch.zeros(2, 1), behaviour_logprobs_TK=torch.zeros(2, 1)),
        "shard": shard,
        "global_tokens": 2,
        "global_sequences": 1,
    }


class Rehearsal:
    """Rehearses requests one after the other in a process whose torch.cuda is a stand-in."""

    def __init__(self, device: FakeDevice, progress: Callable[[str], None]) -> None:
        self._device = device
        self._progress = progress
        self._request: RehearsalRequest | None = None
        self._heard: Any = None  # what the source of the next broadcast would say
        groups = FakeGroups(self._answer, lambda: self._heard, lambda key: self._device.tally.collective(key, 0))
        groups.install()
        device.connect(groups)
        other_ranks.install()
        saved_parameters.install()

    def run(self, request: RehearsalRequest) -> RehearsalResult:
        """Raises NotRehearsable for what the rehearsal cannot do, ValueError for a request that the actor refuses."""
        self._request = request
        layout = request.layout
        os.environ.update(
            RANK=str(request.rank), WORLD_SIZE=str(layout.world_size), LOCAL_RANK=str(request.rank % torch.cuda.device_count())
        )
        self._device.deterministic = request.deterministic
        # Without importing torch's compiler, as torch.use_deterministic_algorithms does: nothing is compiled on fake tensors.
        torch.set_deterministic_debug_mode("error" if request.deterministic else "default")
        # What is alive, other requests have left behind (imports, caches): this request's collections need not look at it again.
        gc.freeze()
        # New ones: Megatron's modules outlive their model in parts.
        self._device.ledger, self._device.host_ledger = MemoryLedger(), MemoryLedger()
        run = _Run(request, self._device, self._hear, self._progress)
        fault = None
        with self._device, torch.autograd.graph.saved_tensors_hooks(self._saved, lambda tensor: tensor):
            try:
                run.all_phases()
            except (NotRehearsable, ValueError):
                raise
            except Exception as error:
                fault = _fault_of(error, run.phase)
            finally:
                run.close()
        return RehearsalResult(
            request=request,
            stage=layout.coordinates(request.rank).pp,
            micro_batches=len(run.tokens),
            micro_batch_tokens=max(run.tokens, default=0),
            phases=tuple(run.results),
            fault=fault,
            torch_version=torch.__version__,
            layers=detect().choose_layers("local").describe_layers(),
            host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
        )

    def _answer(self, obj: Any, rank: int) -> Any:
        request = self._request
        assert request is not None
        return other_ranks.answer_of(obj, rank, me=request.rank, architecture=request.architecture, layout=request.layout)

    def _hear(self, said: Any) -> None:
        self._heard = said

    def _saved(self, tensor: Tensor) -> Tensor:
        self._device.ledger.save_for_backward(tensor)
        return tensor


class _Run:
    """One request. results: of the phases that came to their end, and of the one that failed."""

    def __init__(
        self,
        request: RehearsalRequest,
        device: FakeDevice,
        hear: Callable[[Any], None],
        progress: Callable[[str], None],
    ) -> None:
        self._request = request
        self._device = device
        self._hear = hear
        self._progress = progress
        self.phase = "groups"
        self.tokens: list[int] = []
        self.results: list[PhaseResult] = []

    def all_phases(self) -> None:
        request = self._request
        capabilities = detect().choose_layers("local")
        groups = process_groups.initialize(request.layout, backend=capabilities.backend, seed=_SEED, timeout_s=_TIMEOUT_S)
        with self._measured("build"):
            actor = _RehearsedActor(
                request.architecture,
                request.layout,
                groups,
                capabilities,
                self._settings(),
                announce=self._announce,
                hear=self._hear,
            )
            self._mark_state(actor)
        steps: dict[str, Callable[[], None]] = {
            "load": lambda: self._load(actor),
            "check": lambda: self._check(actor, groups),
            "keep": lambda: self._keep(actor),
            "score": lambda: self._score(actor),
            "update": lambda: self._update(actor),
            "capture": lambda: _capture(actor),
            "export": lambda: _export(actor),
        }
        for name, step in steps.items():
            if name in request.phases and (name != "keep" or request.kept_weights is not None):
                with self._measured(name):
                    step()

    def close(self) -> None:
        """Give everything back, so that another request finds an empty device."""
        self._hear(None)
        if torch.distributed.is_initialized():
            process_groups.shut_down()
        gc.collect()

    @contextmanager
    def _measured(self, name: str) -> Iterator[None]:
        self.phase = name
        self._progress(f"rank {self._request.rank}: {name}")
        gc.collect()
        self._device.tally = tally = Tally()
        self._device.ledger.begin()
        self._device.host_ledger.begin()
        began = time.process_time()
        try:
            yield
        finally:
            seconds, host_peak = time.process_time() - began, self._device.host_ledger.peak
            self.results.append(_phase_result(name, self._device.ledger.end(), host_peak, tally, seconds=seconds))

    def _settings(self) -> ActorSettings:
        request = self._request
        return ActorSettings(
            dtype=_DTYPES[request.dtype],
            recompute=request.recompute,
            max_tokens_per_micro_batch=request.max_tokens_per_micro_batch,
            logprob_chunk_tokens=request.logprob_chunk_tokens,
            temperature=request.temperature,
            optimizer=request.optimizer,
            megatron_options=request.megatron_options,
        )

    def _announce(self, tokens: list[int]) -> None:
        self.tokens = tokens

    def _mark_state(self, actor: MegatronActor) -> None:
        """What outlives a step: Megatron's flat buffers, and what its optimizers keep."""
        memory = self._device.ledger
        for chunk in actor._chunks:
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
                memory.mark(buffer.param_data, ledger_kinds.PARAMETERS)
                memory.mark(buffer.grad_data, ledger_kinds.GRADIENTS)
        for each in inner_optimizers(actor._optimizer):
            for group in each.optimizer.param_groups:
                for parameter in group["params"]:
                    memory.mark(parameter, ledger_kinds.OPTIMIZER)
            for state in each.optimizer.state.values():
                for value in state.values():
                    if isinstance(value, Tensor):
                        memory.mark(value, ledger_kinds.OPTIMIZER)

    def _load(self, actor: MegatronActor) -> None:
        shapes, dtype = hf_shapes(self._request.architecture), _DTYPES[self._request.dtype]

        def read(name: str) -> Tensor:
            with self._device.fake:
                return torch.empty(shapes[name], dtype=dtype)

        actor.load_hugging_face(read)

    def _check(self, actor: MegatronActor, groups: ProcessGroups) -> None:
        self._hear(ModelCheck(num_tokens=1, median=0.0, mean=0.0, largest=0.0, allowed_median=0.0, allowed_mean=0.0))
        check_model(actor, [range(_PROBE_TOKENS)], control_group=groups.control)

    def _keep(self, actor: MegatronActor) -> None:
        place = self._request.kept_weights
        assert place is not None
        actor.keep_weights(place=place)
        assert actor._snapshot is not None
        for kept in actor._snapshot._kept:
            self._device.ledger.mark(kept, ledger_kinds.KEPT)

    def _score(self, actor: MegatronActor) -> None:
        actor.logprobs(self._sequences(streams=False))

    def _update(self, actor: MegatronActor) -> None:
        module, _, function = self._request.update.partition(":")
        step = getattr(importlib.import_module(module), function)
        step(actor, self._sequences(streams=True), learning_rate=_LEARNING_RATE, **self._request.update_options)
        self._mark_state(actor)

    def _sequences(self, *, streams: bool) -> list[TokenSequence]:
        vocabulary = self._request.architecture.vocab_size
        sequences = []
        for length in self._request.lengths:
            num_prompt = min(self._request.prompt_tokens, length // 2)
            sequences.append(
                TokenSequence(
                    token_ids=torch.arange(length + 1) % vocabulary,
                    loss_mask=torch.arange(length) >= num_prompt,
                    streams={"behaviour_logprobs": torch.full((length,), -1.0), "advantages": torch.ones(length)} if streams else {},
                    top=even_top_tokens(length - num_prompt, self._request.top_tokens) if streams and self._request.top_tokens else None,
                )
            )
        return sequences


def _fault_of(error: Exception, phase: str) -> Fault:
    """With the call site where the error does not name one itself."""
    message = " ".join(str(error).split()) or type(error).__name__
    of_device = isinstance(error, DeviceFault)
    if not of_device:
        message += f" at {raised_at(error)}"
    return Fault(phase=phase, kind=type(error).__name__, message=message, of_device=of_device)


def _capture(actor: MegatronActor) -> None:
    with tempfile.TemporaryDirectory() as folder:
        actor.capture(Path(folder))


def _export(actor: MegatronActor) -> None:
    for _ in actor.export_weights():
        pass


def _phase_result(name: str, memory: PhaseMemory, host_peak: int, tally: Tally, *, seconds: float) -> PhaseResult:
    return PhaseResult(
        name=name,
        before=memory.before,
        peak=memory.peak,
        after=memory.after,
        by_kind=memory.by_kind,
        holders=memory.holders[:_HOLDERS],
        timeline=memory.timeline,
        host_peak=host_peak,
        collectives=tuple(
            Collective(**asdict(key), calls=tally.calls[key], bytes_in=tally.bytes_in[key])
            for key in sorted(tally.calls, key=lambda key: (-tally.bytes_in[key], -tally.calls[key]))
        ),
        waits=tuple(Occurrence(what=what, site=site, count=count) for (what, site), count in tally.waits.most_common()),
        guesses=tuple(Occurrence(what=what, site=site, count=count) for (what, site), count in tally.guesses.most_common()),
        kernels=tally.kernels,
        seconds=seconds,
    )
