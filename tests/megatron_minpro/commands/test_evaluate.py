"""The command line: what is refused in one line before anything starts, and what a dry run shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_minpro import cli

FINAL_STEP = "megatron_minpro.tasks.arithmetic_chains.reward:final_step"


@pytest.fixture
def model(tmp_path: Path, chain_tokenizer: Any) -> Path:
    """A folder that looks like a checkpoint; nothing here loads its weights."""
    folder = tmp_path / "model"
    chain_tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3", "max_position_embeddings": 40960}))
    (folder / "model.safetensors").write_bytes(b"")
    return folder


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps({"question": f"1 + {n} :", "answer": str(1 + n)}) + "\n" for n in range(3)))
    return path


def refused(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 2) -> str:
    assert cli.run(["evaluate", *map(str, arguments)]) == code
    error = capsys.readouterr().err.strip()
    assert error.startswith("minpro: error: ") and "\n" not in error
    return error


def test_a_dry_run_shows_what_would_be_sampled_and_leaves_nothing(
    model: Path, own: Path, assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = [str(model), "--benchmarks", f"amc23,{own},math500", "--data", str(assets), "--out", str(out), "--dry-run"]
    assert cli.run(["evaluate", *arguments]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[:3] == [
        "AMC23 (amc23): 40 problems x 128 samples",
        "own (own): 3 problems x 2 samples",
        "MATH500 (math500): 500 problems x 2 samples",
    ]
    assert shown[3] == "6,126 responses of up to 20,480 tokens, temperature 1, top-p 0.7, style boxed"
    assert cli.run(["evaluate", *arguments, "--samples", "4", "--limit", "2", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert {name: (entry["samples"], entry["num_problems"]) for name, entry in planned["benchmarks"].items()} == {
        "amc23": (4, 2), "own": (4, 2), "math500": (4, 2)
    }  # fmt: skip
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "CHECKPOINT is missing"),
        (["{model}", "--benchmarks", "{own}"], "--out is missing"),
        (["{model}", "--out", "x"], "--benchmarks: nothing is named"),
        (["{model}", "--benchmarks", "absent.jsonl", "--out", "x"], "--benchmarks = 'absent.jsonl': no such file"),
        (["{model}", "--benchmarks", "data/rows.csv", "--out", "x"], "--benchmarks = 'data/rows.csv': .csv is not read"),
        (["nowhere", "--benchmarks", "{own}", "--out", "x"], "nowhere: no such file or folder"),
        (["/", "--benchmarks", "{own}", "--out", "x"], "/: holds no config.json, expected a Hugging Face or a Megatron checkpoint"),
        (["{model}", "--benchmarks", "{own}", "--out", "x", "--top-p", "0"], "top_p is 0.0"),
        (["{model}", "--benchmarks", "{own}", "--out", "x", "--temperature", "-1"], "temperature is -1.0"),
        (["{model}", "--benchmarks", "{own}", "--out", "x", "--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["{model}", "--benchmarks", "{own}", "--out", "x", "--style", "boxd"], "--style boxd: expected one of dapo, boxed, bare"),
        (["{model}", "--benchmarks", "{own}", "--out", "x", "--style", "bare"], "--style bare says nowhere where the answer stands"),
        (["{model}", "--benchmarks", "{own}", "--out", "x", "--question-field", "q"], "field 'q' is missing"),
        (["{model}", "--benchmarks", "{own}", "--out", "x", "--endpoint", "host:1"], "--endpoint host:1: expected http://host:port"),
        (["{model}", "--benchmarks", "{own}", "--out", "x", "--api", "chat"], "--api chat needs --endpoint"),
        (["{model}", "--benchmarks", "{own}", "--out", "x", "--model-name", "m"], "--model-name is for OpenAI servers"),
        (["{model}", "--benchmarks", "{own}", "--out", "x", "--api-key-file", "k"], "--api-key-file is for running servers"),
        (["{model}", "--benchmarks", "{own}", "--out", "x", "--config", "{model}"], "is not a Megatron checkpoint; leave --config out"),
        (["{model}", "--benchmarks", "{own}", "--out", "x", "--server-option", "tp"], "--server-option tp: expected KEY=VALUE"),
        (
            [
                "{model}",
                "--benchmarks",
                "{own}",
                "--out",
                "x",
                "--grader",
                FINAL_STEP.replace("step", "stop"),
                "--dry-run",
            ],
            "did you mean 'final_step'",
        ),
        (["--rescore"], "--rescore needs --out"),
        (["{model}", "--rescore", "--out", "{model}"], "leave CHECKPOINT and --benchmarks out"),
        (["--rescore", "--out", "{model}"], "holds no evaluation to rescore"),
        (["--compare", "{model}", "{model}"], "holds no evaluation"),
        (["{model}", "--compare", "{model}", "{model}"], "--compare reads two finished evaluations; leave CHECKPOINT"),
        (["--rescore", "--out", "x", "--compare", "{model}", "{model}"], "--compare reads two finished evaluations"),
    ],
)
def test_wrong_input_is_one_line(
    arguments: list[str],
    message: str,
    model: Path,
    own: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *(word.format(model=model, own=own) for word in arguments))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen3_moe", "tie_word_embeddings": True}, "model/config.json: tie_word_embeddings is True in a qwen3_moe model"),
        (
            {"architectures": ["Qwen3ForSequenceClassification"]},
            "model/config.json: architectures is ['Qwen3ForSequenceClassification']; expected a model that generates text",
        ),
        ({}, "model/adapter_model.safetensors: an adapter, which is not read"),
    ],
)
def test_a_model_served_as_another_is_refused_also_by_a_dry_run(
    change: dict[str, Any], message: str, model: Path, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"model_type": "qwen3", "max_position_embeddings": 40960, "tie_word_embeddings": True, **change}
    (model / "config.json").write_text(json.dumps(config))
    if not change:
        (model / "adapter_model.safetensors").write_bytes(b"")
    assert message in refused(capsys, model, "--benchmarks", own, "--out", tmp_path / "out", "--dry-run")


def test_responses_longer_than_the_model_are_refused_also_by_a_dry_run(
    model: Path, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [model, "--benchmarks", own, "--out", tmp_path / "out", "--max-new-tokens", "40960", "--dry-run"]
    message = refused(capsys, *arguments, "--style", "bare", "--grader", FINAL_STEP)
    assert "--max-new-tokens 40960: with the" in message and "more than the 40960 positions" in message


def test_a_server_that_does_not_answer_ends_with_one_line_and_code_1(
    model: Path, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "evaluate",
        model,
        "--benchmarks",
        own,
        "--out",
        tmp_path / "out",
        "--endpoint",
        "http://127.0.0.1:9",
        "--max-retries",
        "0",
    ]
    assert (
        cli.run(
            [
                *map(str, arguments),
                "--max-new-tokens",
                "9",
                "--style",
                "bare",
                "--grader",
                FINAL_STEP,
            ]
        )
        == 1
    )
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("minpro: error: http://127.0.0.1:9: request own/00000-") and "ConnectError" in error[-1]


def test_another_chat_template_or_label_is_noticed(model: Path, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def planned() -> dict[str, str]:
        assert cli.run(["evaluate", str(model), "--benchmarks", str(own), "--out", str(tmp_path / "out"), "--dry-run", "--json"]) == 0
        return json.loads(capsys.readouterr().out)["benchmarks"]["own"]

    before = planned()
    template = model / "chat_template.jinja"
    template.write_text(template.read_text() + " 1")
    after = planned()
    assert after["prompts"] != before["prompts"] and after["problems"] == before["problems"]
    own.write_text(own.read_text().replace('"answer": "1"', '"answer": "100"'))
    assert planned()["problems"] != before["problems"]
