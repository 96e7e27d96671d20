"""`minpro evaluate` on a policy of a real run: killed, resumed, graded again, through both APIs of real servers."""

from __future__ import annotations

import json
import os
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from checkpoints_convert.policy_folder import load_tokenizer
from megatron_minpro.tasks.arithmetic_chains.prompts import ArithmeticChains
from rollout.sglang.server import ServerPool, ServerSettings
from tests.end_to_end.conftest import Command, wait_for

FINAL_STEP = "megatron_minpro.tasks.arithmetic_chains.reward:final_step"

pytestmark = [pytest.mark.servers, pytest.mark.ranks, pytest.mark.timeout(2400)]
PROBLEMS, SAMPLES = 10, 16


@pytest.fixture(scope="module")
def chains(finished_run: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Held-out chains as any user's file of questions and answers."""
    source = ArithmeticChains(
        load_tokenizer(finished_run["dir"] / "policy"), num_operations=6, modulus=10, size=1000, seed=1, split="held_out"
    )
    path = tmp_path_factory.mktemp("chains") / "chains.jsonl"
    rows = [{"question": source[index].text, "answer": source[index].answer} for index in range(PROBLEMS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def endpoint(finished_run: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A running server of the trained policy that also speaks OpenAI's API."""
    settings = ServerSettings(
        model_path=finished_run["dir"] / "policy", device="cpu", tp=1, dtype="float32", seed=0, deterministic=False, text_api=True
    )
    with ServerPool.start(settings, num_servers=1, log_dir=tmp_path_factory.mktemp("server"), start_timeout_s=900) as pool:
        yield pool.endpoints[0]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_killed_evaluation_continues_and_samples_nothing_twice(
    minpro: Callable[..., Command], finished_run: dict[str, Any], chains: Path, assets: Path, endpoint: str, tmp_path: Path
) -> None:
    out = tmp_path / "evaluation"
    asked = ["evaluate", str(finished_run["dir"] / "checkpoints/latest"), "--benchmarks", f"{chains},gsm8k"]
    asked += [
        "--data",
        str(assets),
        "--limit",
        str(PROBLEMS),
        "--samples",
        str(SAMPLES),
        "--style",
        "bare",
        "--grader",
        FINAL_STEP,
    ]
    asked += ["--max-new-tokens", "56", "--concurrency", "2", "--dtype", "float32", "--out", str(out)]
    responses = out / "responses/chains.jsonl"
    killed = minpro(*asked)
    wait_for(lambda: responses.exists() and responses.read_text().count("\n") >= 8, killed)
    os.kill(killed.process.pid, signal.SIGKILL)
    killed.process.wait()
    assert killed.survivors() == []  # its server among them
    kept = responses.read_bytes()
    assert kept.count(b"\n") < PROBLEMS * SAMPLES
    responses.write_bytes(kept + b'{"problem_id": "00003-')  # as a kill in the middle of a write leaves it

    code, _, err = minpro(*asked, "--temperature", "0.5").wait()
    assert code == 2 and "temperature: 1.0 there, 0.5 here" in err and len(err.strip().splitlines()) == 1

    code, stdout, err = minpro(*asked, "--endpoint", endpoint, "--json").wait()
    assert code == 0, err
    results = json.loads(stdout)
    assert responses.read_bytes().startswith(kept)
    assert (results["attempts"], results["torn_responses"]) == (2, 1)
    for name in ("chains", "gsm8k"):
        counted = Counter((line["problem_id"], line["sample"]) for line in lines(out / f"responses/{name}.jsonl"))
        assert len(counted) == PROBLEMS * SAMPLES and set(counted.values()) == {1}
        graded = {(line["problem_id"], line["sample"]) for line in lines(out / f"grades/{name}.jsonl")}
        assert graded == set(counted)

    # Judged here by a rule of its own; a chain's answer is the number of its last step.
    answers = {line["problem_id"]: line["label"] for line in lines(out / "problems/chains.jsonl")}
    right = [
        (found := re.search(r"= (\d+) ;\s*(?:<\|end\|>)?$", line["text"])) is not None
        and found[1] == answers[line["problem_id"]]
        and line["finish_reason"] == "stop"
        for line in lines(responses)
    ]
    assert results["benchmarks"]["chains"]["correct"] == sum(right) > 0
    assert results["benchmarks"]["chains"]["pass_at_k"][0]["mean"] == pytest.approx(sum(right) / len(right))
    assert [entry["k"] for entry in results["benchmarks"]["gsm8k"]["pass_at_k"]] == [1, 2, 4, 8, 16] * 2
    assert results["benchmarks"]["gsm8k"]["correct"] == 0  # words that it never saw
    assert (out / "pass_at_k.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "chains (avg@16)" in (out / "tables/scores.md").read_text()

    grades = sorted(map(json.dumps, lines(out / "grades/chains.jsonl")))
    (out / "grades/chains.jsonl").write_text("")
    code, stdout, err = minpro("evaluate", "--rescore", "--out", str(out), "--json").wait()
    assert code == 0, err
    assert sorted(map(json.dumps, lines(out / "grades/chains.jsonl"))) == grades
    assert json.loads(stdout)["benchmarks"] == results["benchmarks"]


def test_both_apis_send_the_same_tokens_and_math_verify_grades(
    minpro: Callable[..., Command], finished_run: dict[str, Any], chains: Path, assets: Path, endpoint: str, tmp_path: Path
) -> None:
    runs = {}
    for api in ("native", "completions"):
        asked = ["evaluate", str(finished_run["dir"] / "policy"), "--benchmarks", f"{chains},gsm8k", "--data", str(assets)]
        asked += ["--limit", "4", "--samples", "2", "--style", "boxed", "--temperature", "0", "--max-new-tokens", "40"]
        runs[api] = minpro(*asked, "--api", api, "--endpoint", endpoint, "--out", str(tmp_path / api))
    for api, command in runs.items():
        code, out, err = command.wait()
        assert code == 0, err
        assert "math-verify and plain comparison differ on 0 samples" in out, api

    def texts(api: str) -> dict[tuple[str, int], str]:
        found = lines(tmp_path / api / "responses/gsm8k.jsonl") + lines(tmp_path / api / "responses/chains.jsonl")
        return {(line["problem_id"], line["sample"]): line["text"].replace("<|end|>", "").strip() for line in found}

    assert texts("native") == texts("completions")
    code, out, err = minpro("evaluate", "--compare", str(tmp_path / "native"), str(tmp_path / "completions"), "--json").wait()
    assert code == 0, err
    assert {(row["difference"], row["low"], row["high"]) for row in json.loads(out)} == {(0.0, 0.0, 0.0)}
