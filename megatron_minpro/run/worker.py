"""What one trainer rank does: train, or warm up the base model. rank.py starts it.

RUN_DIR/config.yaml is the resolved configuration. Rank 0 waits for RUN_DIR/endpoints.json, a list of server addresses.
A file RUN_DIR/stop, or SIGUSR1 to rank 0, ends the run with a checkpoint before the next update.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from checkpoints_convert.atomic_files import write_atomically
from checkpoints_convert.dtypes import DTYPES
from checkpoints_convert.hf_config import read_architecture
from checkpoints_convert.policy_folder import export_policy, load_tokenizer
from checkpoints_convert.safetensors_io import SafetensorsReader
from megatron_minpro.batch.staleness import StalenessBuffer
from megatron_minpro.config import RunConfig, load_config
from megatron_minpro.loop import schedule
from megatron_minpro.loop.counters import RunCounters, UnfinishedStep
from megatron_minpro.loop.driver import RunDriver
from megatron_minpro.loop.server_weights import RollingWeights
from megatron_minpro.loop.servers import publish, weights_of
from megatron_minpro.loop.training_run import TrainingRun, share
from megatron_minpro.objectives import make_objective
from megatron_minpro.run import base_model, run_state
from megatron_minpro.run.batch_files import restore_files
from megatron_minpro.run.checkpoint_writer import CheckpointWriter
from megatron_minpro.run.finished import summarise
from megatron_minpro.run.last_words import last_words
from megatron_minpro.run.process_settings import configure_process
from megatron_minpro.run.profiling import StepProfiler
from megatron_minpro.run.record_versions import attempt_versions
from megatron_minpro.run.run_folder import (
    ENDPOINTS_FILE,
    EXPORT_FOLDER,
    INITIAL_MODEL_FOLDER,
    LOST_FILE,
    STOP_FILE,
    forget_unfinished_attempt,
)
from megatron_minpro.run.sampling.process import SamplingProcess
from megatron_minpro.run.server_limits import hang_is_over_s, weight_bytes, weight_limits
from megatron_minpro.run.weight_sync import WeightSyncContext, make_server_weights
from megatron_minpro.tracking.late_files import LateFiles
from megatron_minpro.tracking.metrics_file import MetricsFile
from megatron_minpro.tracking.progress import DONE, STOPPED, Progress, write_progress
from megatron_minpro.tracking.run_files import CONFIG_FILE, RESULT_FILE, VERSIONS_FILE
from megatron_minpro.tracking.sampled_count import read_sampled
from megatron_minpro.tracking.token_records import forget_token_records
from megatron_minpro.tracking.tracker import RunTracker, make_tracker
from megatron_minpro.tracking.versions import append_versions
from parallel import process_groups
from parallel.actor import ActorSettings, MegatronActor
from parallel.capabilities import detect
from parallel.model_check import check_model
from parallel.optimizer_settings import OptimizerSettings
from parallel.process_groups import ProcessGroups
from parallel.weights import take_part
from rollout.freed_memory import keep_freed_memory
from rollout.processes import die_with_parent
from rollout.sglang.server import read_key

log = logging.getLogger(__name__)

_PROBES, _PROBE_TOKENS = 8, 64


def build_actor(
    config: RunConfig, folder: Path, groups: ProcessGroups, *, optimizer: OptimizerSettings, temperature: float
) -> MegatronActor:
    """An actor with the weights of a Hugging Face folder. temperature: at which log-probs are computed."""
    settings = ActorSettings(
        dtype=DTYPES[config.model.dtype],
        recompute=config.actor.recompute,
        max_tokens_per_micro_batch=config.actor.max_tokens_per_micro_batch,
        logprob_chunk_tokens=config.actor.logprob_chunk_tokens,
        temperature=temperature,
        optimizer=optimizer,
        megatron_options=config.megatron,
    )
    actor = MegatronActor(read_architecture(folder), config.layout, groups, detect().choose_layers(config.actor.layers), settings)
    with SafetensorsReader(folder) as reader:
        actor.load_hugging_face(reader.read)
    return actor


def train(config: RunConfig, run_dir: Path, groups: ProcessGroups, sampling: SamplingProcess | None) -> None:
    """The whole run of one rank: build, resume, measure, train, measure, export. sampling: rank 0's."""
    first = groups.coordinates.rank == 0
    folder = Path(config.model.path)
    if first:
        write_progress(run_dir, Progress(phase="building the model", global_step=0))
    actor = build_actor(
        config,
        folder,
        groups,
        optimizer=config.actor.optimizer,
        temperature=config.rollout.temperature,  # the policy is the distribution that is sampled from
    )
    checkpoints = run_dir / "checkpoints"
    checkpoint = _checkpoint_to_continue(checkpoints, config, groups)
    if checkpoint is None and first:
        forget_unfinished_attempt(run_dir)
    buffer = StalenessBuffer(config.staleness)
    counters, cursor_state, unfinished = RunCounters(), None, None
    if checkpoint is not None:
        if first:
            write_progress(run_dir, Progress(phase=f"loading {checkpoint.name}", global_step=0))
        saved = run_state.load(checkpoint, actor=actor, config=config)
        counters, cursor_state, unfinished = saved.counters, saved.cursor, saved.unfinished
        buffer.restore(saved.waiting)
        if first:
            restore_files(checkpoint, run_dir, saved.waiting)
        log.info("resumed from %s at global step %d, policy version %d", checkpoint, counters.next_step, actor.policy_version)
    driver = None if sampling is None else build_driver(config, run_dir, counters, cursor_state, sampling, unfinished=unfinished)
    if driver is not None:
        endpoints, key = wait_for_endpoints(run_dir, timeout_s=0.0), _api_key(config)
        versions = attempt_versions(detect(), endpoints, key=key, timeout_s=config.rollout.control_timeout_s)
        driver.files.write(VERSIONS_FILE, partial(append_versions, run_dir, global_step=counters.next_step, versions=versions))
    writer = CheckpointWriter(
        checkpoints,
        run_dir=run_dir,
        keep=config.checkpoint.keep,
        control_group=groups.control,
        saving_group=groups.saving,
        before_rename=None if driver is None else driver.files.flush,
    )

    profiler = StepProfiler(run_dir, steps=config.profile.first_and_last, rank=groups.coordinates.rank)
    run = TrainingRun(
        config=config,
        actor=actor,
        objective=make_objective(config.objective.name, **config.objective.options),
        buffer=buffer,
        counters=counters,
        driver=driver,
        control_group=groups.control,
        stop_requested=_stop_requested(run_dir),
        checkpoints=RunCheckpoints(writer=writer, config=config, actor=actor, counters=counters, buffer=buffer, driver=driver),
        at_step=profiler.at_step,
    )
    if driver is not None:
        driver.heartbeat("checking the model")
    probes = share(run, None if driver is None else probe_sequences(driver.sampler.example_tokens(_PROBES)))
    log.info(check_model(actor, probes, control_group=groups.control).line())
    # The servers' weights are those that sample next from the first request on, resumed or not.
    with weights_of(run, actor.policy_version if actor.kept_version is None else actor.kept_version):
        publish(run)
    measure: tuple[str, ...] = ()
    if config.evaluation is not None:
        measured = share(run, (run_dir / "evaluation_before.json").exists())  # rank 0's view: file systems may lag
        if not measured and actor.policy_version > 0:
            raise ValueError(f"{run_dir / 'evaluation_before.json'}: is gone, and the policy was trained since; it cannot be measured now")
        measure = ("after",) if measured else ("before", "after")
    try:
        complete = schedule.train(run, unfinished=unfinished, measure=measure)
    finally:
        writer.join()  # what was captured is complete, whatever ends this
    profiler.close()
    if complete:
        tensors = actor.export_weights()
        if driver is not None:
            driver.heartbeat("export")
            export_policy(run_dir / EXPORT_FOLDER, tensors, dtype=DTYPES[config.model.dtype], like=folder, replace=True)
        else:
            take_part(tensors)
    if driver is not None:
        driver.close()
        result = {**asdict(counters), "complete": complete, "policy_version": actor.policy_version}
        write_atomically(run_dir / RESULT_FILE, json.dumps(result, indent=2) + "\n")
        driver.tracker.finish(summarise(config, run_dir, counters.seconds) if complete else result)
        driver.heartbeat(DONE if complete else STOPPED)


def probe_sequences(prompts: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Token ids for the check of the built model: the beginnings of a few training prompts, text that the model knows."""
    beginnings = [token_ids[:_PROBE_TOKENS] for token_ids in prompts]
    return [ids if len(ids) > 1 else ids * 2 for ids in beginnings]


def _checkpoint_to_continue(checkpoints: Path, config: RunConfig, groups: ProcessGroups) -> Path | None:
    """Rank 0's choice on every rank; later checkpoints are forgotten."""
    chosen: list[Path | None] = [None]
    if groups.coordinates.rank == 0:
        chosen = [run_state.checkpoint_to_continue(checkpoints, config)]
        if chosen[0] is not None:
            run_state.forget_later(chosen[0])
    dist.broadcast_object_list(chosen, src=0, group=groups.control)
    return chosen[0]


@dataclass(frozen=True, kw_only=True)
class RunCheckpoints:
    """The `training_run.Checkpoints` of a real run."""

    writer: CheckpointWriter
    config: RunConfig
    actor: MegatronActor
    counters: RunCounters
    buffer: StalenessBuffer
    driver: RunDriver | None

    def save(self, unfinished: UnfinishedStep | None) -> None:
        """Save the current state of the fields above. unfinished: see CheckpointWriter.save."""
        if self.driver is not None:
            self.driver.heartbeat("checkpoint")
        self.writer.save(
            actor=self.actor,
            config=self.config,
            counters=self.counters,
            cursor=dict(self.driver.cursor) if self.driver is not None else None,
            waiting=self.buffer.waiting(),
            unfinished=unfinished,
        )

    def wait(self) -> None:
        """See CheckpointWriter."""
        self.writer.wait()

    def seconds(self) -> float | None:
        """See CheckpointWriter."""
        return self.writer.seconds


def build_driver(
    config: RunConfig,
    run_dir: Path,
    counters: RunCounters,
    cursor_state: dict[str, Any] | None,
    sampling: SamplingProcess,
    *,
    unfinished: UnfinishedStep | None = None,
) -> RunDriver:
    """Rank 0's part. Waits for the servers. unfinished: what is done of the step that comes next."""
    count_lost(run_dir, counters)
    metrics = MetricsFile(run_dir)
    metrics.truncate_after(counters.next_step - 1)
    forget_token_records(run_dir, global_step=counters.next_step, update=0 if unfinished is None else unfinished.updates)
    files = LateFiles(run_dir)
    tracker = RunTracker(metrics, [make_tracker(entry, run_dir) for entry in config.tracking.trackers], files)
    tracker.start(config.model_dump(mode="json"))
    rollout = config.rollout
    write_progress(run_dir, Progress(phase="waiting for servers", global_step=counters.trained_batches))
    endpoints = wait_for_endpoints(run_dir, timeout_s=rollout.start_timeout_s)
    api_key = _api_key(config)
    admin_key = None if rollout.admin_key_path is None else read_key(Path(rollout.admin_key_path), name="rollout.admin_key_path")
    weights = make_server_weights(
        WeightSyncContext(config=config, run_dir=run_dir, endpoints=endpoints, api_key=api_key, admin_key=admin_key)
    )
    if isinstance(weights, RollingWeights):
        sampling.offer_weights(weights.give)
    next_sampled = counters.next_step + (unfinished is not None and unfinished.batch == "waiting")
    cursor = sampling.start(endpoints=endpoints, cursor=cursor_state, next_step=next_sampled, device_type=detect().device_type)
    return RunDriver(
        config=config,
        run_dir=run_dir,
        sampler=sampling,
        weights=weights,
        tracker=tracker,
        files=files,
        cursor=cursor,
        trained_batches=counters.trained_batches,
    )


def _api_key(config: RunConfig) -> str | None:
    path = config.rollout.api_key_path
    return None if path is None else read_key(Path(path), name="rollout.api_key_path")


def count_lost(run_dir: Path, counters: RunCounters) -> None:
    """Count what an earlier attempt sampled after its last checkpoint, and keep the count before the metrics that tell of it are cut."""
    path = run_dir / LOST_FILE
    recorded = json.loads(path.read_text(encoding="utf-8")) if path.exists() else counters.rollouts_lost
    counters.count_lost(read_sampled(run_dir), recorded=recorded)
    write_atomically(path, f"{counters.rollouts_lost}\n")


def wait_for_endpoints(run_dir: Path, *, timeout_s: float) -> list[str]:
    """The addresses in RUN_DIR/endpoints.json, once it is there. Raises TimeoutError."""
    path = run_dir / ENDPOINTS_FILE
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} did not appear within {timeout_s:.0f} s: the rollout servers are not ready")
        time.sleep(0.2)
    return json.loads(path.read_text(encoding="utf-8"))


def warm_up(config: RunConfig, run_dir: Path, groups: ProcessGroups) -> None:
    """Make the base model: supervised learning from RUN_DIR/initial_model to model.path."""
    recipe = config.model.warm_up
    assert recipe is not None
    folder = run_dir / INITIAL_MODEL_FOLDER
    first = groups.coordinates.rank == 0
    actor = build_actor(config, folder, groups, optimizer=base_model.OPTIMIZER, temperature=1.0)

    def report(step: int, loss: float) -> None:
        if first and (step % 20 == 0 or step == recipe.num_steps - 1):
            write_progress(
                run_dir, Progress(phase="base model", global_step=0, detail=f"step {step + 1} of {recipe.num_steps}, loss {loss:.3f}")
            )
            log.info("warm-up step %d: loss %.4f", step, loss)

    base_model.warm_up_actor(actor, recipe, config.prompts, load_tokenizer(folder), report=report)
    tensors = actor.export_weights()
    if first:
        made_by = {base_model.RECIPE_FILE: base_model.recipe(config.model, config.prompts).encode()}
        destination, dtype = Path(config.model.path), DTYPES[config.model.dtype]
        export_policy(destination, tensors, dtype=dtype, like=folder, replace=False, extra_files=made_by)
    else:
        take_part(tensors)


def collective_timeout_s(config: RunConfig) -> float:
    """The ranks that do not sample wait in a collective for the one that does: longer than a hang and the start of a server, than an update
    of weights, and than all retries in every round of dynamic sampling and in the held-out measurement, which comes before the batch in the
    same wait. With rolling publish a share that goes to another server waits there for a share of the next batch."""
    rollout = config.rollout
    rounds = 1 if rollout.dynamic_sampling is None else rollout.dynamic_sampling.max_rounds
    times_asked = rounds + (config.evaluation is not None) + (rollout.publish == "rolling")
    update_s = weight_limits(config).moving(weight_bytes(config))
    return 600.0 + hang_is_over_s(config) + update_s + rollout.request_timeout_s * (rollout.max_retries + 1) * times_asked


def _stop_requested(run_dir: Path) -> Callable[[], bool]:
    asked = False

    def remember(*_: object) -> None:
        nonlocal asked
        asked = True

    signal.signal(signal.SIGUSR1, remember)
    return lambda: asked or (run_dir / STOP_FILE).exists()


def main(arguments: list[str]) -> None:
    """Called by rank.py in every rank. arguments: RUN_DIR, and train or warm_up."""
    die_with_parent(parent_pid=os.getppid())
    run_dir, task = Path(arguments[0]), arguments[1]
    config = load_config(run_dir / CONFIG_FILE, [])
    rank = int(os.environ["RANK"])
    capabilities = detect().choose_layers(config.actor.layers)
    # First of all: it loads the prompts meanwhile, and only a process without threads can be forked.
    sampling = SamplingProcess(run_dir, forked=capabilities.device_type == "cpu") if rank == 0 and task == "train" else None
    configure_process(
        config,
        name=f"rank {rank}",
        log_level=config.tracking.log_level if rank == 0 else "warning",
        device_type=capabilities.device_type,
    )
    if capabilities.device_type == "cpu":
        keep_freed_memory()
    for line in capabilities.lines():
        log.info(line)
    with last_words(run_dir, rank=rank):
        groups = process_groups.initialize(
            config.layout, backend=capabilities.backend, seed=config.seed, timeout_s=collective_timeout_s(config)
        )
        if task == "train":
            train(config, run_dir, groups, sampling)
        else:
            warm_up(config, run_dir, groups)
        dist.barrier()
        process_groups.shut_down()
