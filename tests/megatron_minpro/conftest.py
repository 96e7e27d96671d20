"""Batches and modules that several tests of this folder share."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_minpro.batch.conversation import Conversation
from megatron_minpro.batch.sample import STREAMS, RolloutBatch, Sample
from rollout.records import VersionSpan


def content(batches: Sequence[RolloutBatch]) -> list[Any]:
    """Every number of the batches, as Python compares them: bit by bit."""
    return [(batch.sampled_at_step, batch.policy_version, batch.group_size, sample_content(batch.samples)) for batch in batches]


def sample_content(samples: Sequence[Sample]) -> list[Any]:
    """As `content`."""
    values = [getattr(sample, field.name) for sample in samples for field in fields(Sample)]
    return [value.tolist() if isinstance(value, torch.Tensor) else value for value in values]


async def unjudged(conversation: Conversation) -> Conversation:
    """For `hold_conversations` where only the conversations matter."""
    return conversation


HIDING = "a module of the working folder was imported in place of ours"


@pytest.fixture
def hostile_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with modules and folders of the same names as ours; PYTHONPATH names it too, as many a shell profile does."""
    folder = tmp_path_factory.mktemp("working_folder")
    for name in ("parallel.py", "checkpoints_convert.py", "rollout/__init__.py", "sglang.py", "math_verify.py", "configs/__init__.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"raise RuntimeError({HIDING!r})\n")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", ".", *filter(None, [os.environ.get("PYTHONPATH")])]))
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium. Of one module: while it is open, nothing else in the process may run an event loop."""
    found = shutil.which("chromium")
    if found is None:
        reason = "chromium is not installed; it opens the pages that are made"
        if os.environ.get("CI", "").lower() in ("1", "true"):
            pytest.fail(reason)
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def make_sample() -> Callable[..., Sample]:
    """A sample of 3 prompt and `response` response tokens whose numbers tell `number` and `version`; any field can be given,
    streams as tuples too."""

    def make(number: int = 0, *, response: int = 2, version: int = 0, **fields: object) -> Sample:
        values: dict[str, Any] = {
            "sample_id": f"sample-{number}",
            "token_ids": (*range(3), *range(10 * number, 10 * number + response)),
            "loss_mask": (False,) * 3 + (True,) * response,
            "engine_logprobs": tuple(-0.1 * (t + 1) - number for t in range(response)),
            "behaviour_logprobs": tuple(-0.3 * (t + 1) - number for t in range(response)),
            "version_spans": (VersionSpan(policy_version=version, start=0, end=response),),
            "finish_reason": "stop",
            "reward": float(number % 2),
            "correct": number % 2 == 1,
            "advantage": 0.1 * number,
            **fields,
        }
        for name, dtype in STREAMS.items():
            if isinstance(values.get(name), tuple):
                values[name] = torch.tensor(values[name], dtype=dtype)
        return Sample(**values)

    return make


@pytest.fixture
def make_batch(make_sample: Callable[..., Sample]) -> Callable[..., RolloutBatch]:
    """The batch of one step: `groups` groups of 2 samples, numbered from 0, sampled under `version`."""

    def make(step: int, *, groups: int = 2, version: int = 0, **fields: object) -> RolloutBatch:
        samples = tuple(make_sample(number, version=version, **fields) for number in range(2 * groups))
        return RolloutBatch(sampled_at_step=step, policy_version=version, group_size=2, samples=samples)

    return make


@pytest.fixture
def users_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Writes a module into the working folder, which is a temporary one, and gives its name; the module is forgotten afterwards."""
    written = []
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> str:
        written.append(f"users_module_{len(written)}")
        (tmp_path / f"{written[-1]}.py").write_text(text)
        return written[-1]

    yield write
    for name in written:
        sys.modules.pop(name, None)
