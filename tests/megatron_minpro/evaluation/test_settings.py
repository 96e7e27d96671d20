"""Unlike things are never mixed in one folder: every difference is named."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_minpro.evaluation.folder import ownership
from megatron_minpro.evaluation.settings import (
    BenchmarkSettings,
    EvaluationSettings,
    GradingSettings,
    SamplingSettings,
    digest,
    merged,
    read_settings,
    weights_digest,
    write_settings,
)

AIME = BenchmarkSettings(title="AIME24", samples=128, num_problems=30, problems="abc", prompts="def")
SETTINGS = EvaluationSettings(
    sampling=SamplingSettings(
        checkpoint="/models/a",
        weights="123",
        api="token_ids",
        style="boxed",
        temperature=1.0,
        top_p=0.7,
        max_new_tokens=100,
        end_token_ids="2 5",
        seed=0,
    ),
    grading=GradingSettings(grader="math_verify", timeout_s=5.0),
    benchmarks={"aime24": AIME},
)


def test_settings_are_read_back(tmp_path: Path) -> None:
    assert read_settings(tmp_path) is None
    write_settings(tmp_path, SETTINGS)
    assert read_settings(tmp_path) == SETTINGS


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"sampling": {"top": 1}, "grading": {}, "benchmarks": {}}'])
def test_a_strange_settings_file_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(ValueError, match=r"settings\.json: not the settings of an evaluation"):
        read_settings(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("checkpoint", "/models/b", "checkpoint: '/models/a' there, '/models/b' here"),
        ("weights", "456", "weights: '123' there, '456' here"),
        ("api", "chat", "api: 'token_ids' there, 'chat' here"),
        ("style", "dapo", "style: 'boxed' there, 'dapo' here"),
        ("temperature", 0.6, "temperature: 1.0 there, 0.6 here"),
        ("top_p", 1.0, "top_p: 0.7 there, 1.0 here"),
        ("max_new_tokens", 50, "max_new_tokens: 100 there, 50 here"),
        ("seed", 1, "seed: 0 there, 1 here"),
    ],
)
def test_every_setting_that_changes_a_response_is_refused_by_name(name: str, value: object, message: str, tmp_path: Path) -> None:
    other = replace(SETTINGS, sampling=replace(SETTINGS.sampling, **{name: value}))
    with pytest.raises(ValueError, match=message):
        merged(SETTINGS, other, folder=tmp_path)


def test_several_differences_are_all_named(tmp_path: Path) -> None:
    other = replace(
        SETTINGS,
        grading=GradingSettings(grader="final_step", timeout_s=5.0),
        benchmarks={"aime24": replace(AIME, problems="xyz", prompts="uvw", samples=64)},
    )
    with pytest.raises(ValueError) as refused:
        merged(SETTINGS, other, folder=tmp_path)
    for part in (
        "grader: 'math_verify' there, 'final_step' here",
        "aime24: problems: 'abc'",
        "aime24: prompts: 'def'",
        "aime24: samples: 128 there, 64 here",
    ):
        assert part in str(refused.value)


def test_more_samples_and_further_benchmarks_are_welcome(tmp_path: Path) -> None:
    more, further = replace(AIME, samples=256), replace(AIME, title="AMC23")
    found = merged(SETTINGS, replace(SETTINGS, benchmarks={"aime24": more, "amc23": further}), folder=tmp_path)
    assert found.benchmarks == {"aime24": more, "amc23": further}
    assert merged(found, replace(SETTINGS, benchmarks={"amc23": further}), folder=tmp_path) == found


def test_another_export_to_the_same_place_is_noticed(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"one")
    (tmp_path / "README.md").write_text("anything")
    before = weights_digest(tmp_path)
    (tmp_path / "README.md").write_text("something else")
    assert weights_digest(tmp_path) == before
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    assert weights_digest(tmp_path) != before


def test_a_digest_is_short_and_tells_contents_apart() -> None:
    assert digest([{"label": "1"}]) == digest([{"label": "1"}]) != digest([{"label": "2"}])
    assert len(digest([])) == 16


def test_two_processes_do_not_write_into_one_folder(tmp_path: Path) -> None:
    with ownership(tmp_path), pytest.raises(ValueError, match="another process evaluates into it"), ownership(tmp_path):
        pass
    with ownership(tmp_path):
        pass
