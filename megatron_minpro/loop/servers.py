"""Asking the servers and giving them weights, on all ranks together."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from megatron_minpro.loop.training_run import Driver, StopRequested, TrainingRun, share
from parallel.weights import take_part
from rollout.background import in_background
from rollout.client import RolloutFailed, WeightsMissing

_LOOK_S = 0.5  # how often rank 0 looks for a stop while it waits
_MOST_FAILED_PUBLISHES = 3  # in a row; then the run stops, because the cause is not temporary
T = TypeVar("T")
log = logging.getLogger(__name__)


class ServersFailed(RuntimeError):
    """The servers gave no answer. Raised on all ranks together. The state can be saved; the batch that was asked for is missing in it."""


def publish(run: TrainingRun) -> str | None:
    """Give the servers the actor's weights, under the actor's policy version; prove it when debug.check_weights is on.

    None, or on every rank why no server took them. Then no batch is sampled until `ask_servers` has published them again.
    """
    failure = None
    if run.driver is not None:
        failure = run.driver.publish(run.actor.policy_version, run.actor.export_weights())
    else:
        take_part(run.actor.export_weights())
    failure = share(run, failure)
    if failure is not None:
        log.warning("weights are not published: %s", failure)
    elif run.config.debug.check_weights and run.driver is not None:
        run.driver.check_weights(run.actor.export_weights())
    elif run.config.debug.check_weights:
        take_part(run.actor.export_weights())
    return failure


def ask_servers(run: TrainingRun, ask: Callable[[Driver], T], *, policy_version: int | None = None) -> T | None:
    """Collective. `ask(driver)` on rank 0, None on the others.

    Where no server holds the wanted weights (all were restarted since), all ranks publish them and rank 0 asks again. A stop ends the
    waiting: then `ask` goes on in its thread and nobody takes the answer.

    Args:
        run: the run.
        ask: called on rank 0 in a thread, again after each publish.
        policy_version: of the weights that are asked: the actor's, or the kept ones; None: the actor's.

    Raises:
        ServersFailed: on all ranks, when there is no answer, or when the weights cannot be published.
        StopRequested: on all ranks, when rank 0 was asked to stop and the answer is not here.
    """
    failed_publishes = 0
    while True:
        answer, trouble = None, None
        if run.driver is not None:
            try:
                answer = _answer(run, in_background(partial(ask, run.driver), name="question to the servers"))
            except WeightsMissing as missing:
                trouble = ("publish again", str(missing))
            except RolloutFailed as failed:
                trouble = ("give up", str(failed))
            except StopRequested:
                trouble = ("stop", "")
        trouble = share(run, trouble)
        if trouble is None:
            return answer
        remedy, reason = trouble
        if remedy == "stop":
            raise StopRequested
        log.warning("%s: %s", remedy, reason)
        if remedy == "give up":
            raise ServersFailed(reason)
        with weights_of(run, run.actor.policy_version if policy_version is None else policy_version):
            failure = publish(run)
        failed_publishes = 0 if failure is None else failed_publishes + 1
        if failure is not None and failed_publishes == _MOST_FAILED_PUBLISHES:
            raise ServersFailed(failure)


def _answer(run: TrainingRun, future: Future[T]) -> T:
    """On rank 0: what the future holds. Raises StopRequested when that is not there and the run was asked to stop."""
    while not wait((future,), timeout=_LOOK_S).done:
        if run.stop_requested():
            raise StopRequested
    return future.result()


@contextmanager
def weights_of(run: TrainingRun, policy_version: int) -> Iterator[None]:
    """Inside the block the actor has the weights of that version: its own, or the kept ones. Raises RuntimeError when it has neither."""
    if policy_version == run.actor.policy_version:
        yield
    elif policy_version == run.actor.kept_version:
        with run.actor.kept_weights():
            yield
    else:
        raise RuntimeError(
            f"policy version {policy_version} is wanted; the actor is at {run.actor.policy_version} and keeps {run.actor.kept_version}"
        )


def evaluate(run: TrainingRun, label: str) -> None:
    """Held-out measurement, under the weights that sample next, on rank 0 while the others wait. Raises ServersFailed, StopRequested."""
    start, version = time.perf_counter(), run.sampling_version
    if run.driver is not None:
        run.driver.heartbeat(f"evaluation {label}")
    ask_servers(run, lambda driver: driver.evaluate(label, policy_version=version), policy_version=version)
    run.counters.add_seconds("evaluate", time.perf_counter() - start)
