"""Input that cannot work is refused before a process starts, naming the key, the value and what was expected."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from checkpoints_convert.hf_config import Architecture
from megatron_minpro.cluster import checks
from megatron_minpro.config import RunConfig, load_config
from parallel.capabilities import detect
from tests.rollout.generate_stub import Stub, all_good

REPOSITORY = Path(__file__).resolve().parents[3]


def tiny(folder: Path, *overrides: str) -> RunConfig:
    return load_config(REPOSITORY / "configs/tiny_moe_cpu.yaml", [f"model.path={folder}/model", "prompts.max_prompt_tokens=64", *overrides])


def test_replay_without_experts_is_refused(tmp_path: Path) -> None:
    config = tiny(tmp_path, "actor.routing_replay=trainer", "parallel.ep=1")
    assert config.model.warm_up is not None
    shape = {**config.model.warm_up.architecture, "vocab_size": 32}
    checks.check_architecture(config, Architecture.from_config(shape, source="test"))
    of_experts = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step")
    dense = {"model_type": "qwen3", **{key: value for key, value in shape.items() if key not in (*of_experts, "model_type")}}
    with pytest.raises(ValueError, match=r"^actor\.routing_replay = 'trainer': the model has no experts; expected none$"):
        checks.check_architecture(config, Architecture.from_config(dense, source="test"))


def test_options_of_servers_that_return_no_experts_are_refused(tmp_path: Path) -> None:
    config = tiny(tmp_path, "actor.routing_replay=server", "sglang.chunked_prefill_size=-1")
    assert config.model.warm_up is not None
    architecture = Architecture.from_config({**config.model.warm_up.architecture, "vocab_size": 32}, source="test")
    with pytest.raises(ValueError, match=r"^actor\.routing_replay = 'server': sglang\.chunked_prefill_size = -1: .* expected a positive"):
        checks.check_architecture(config, architecture)
    checks.check_architecture(tiny(tmp_path, "actor.routing_replay=trainer", "sglang.chunked_prefill_size=-1"), architecture)


def test_score_centering_with_more_tokens_than_there_are_is_refused(tmp_path: Path) -> None:
    config = tiny(tmp_path, "objective.score_centering.top_k=33", "behaviour_logprobs=engine")
    assert config.model.warm_up is not None
    architecture = Architecture.from_config({**config.model.warm_up.architecture, "vocab_size": 32}, source="test")
    with pytest.raises(ValueError, match=r"^objective\.score_centering\.top_k = 33: expected at most 32, the model's vocab_size$"):
        checks.check_architecture(config, architecture)
    given = ["objective.score_centering.top_k=32", "behaviour_logprobs=engine"]
    checks.check_architecture(tiny(tmp_path, *given), architecture)
    with pytest.raises(
        ValueError, match=r"^objective\.score_centering = \{'top_k': 32\}: sglang\.enable_watermark = True: .* expected false$"
    ):
        checks.check_architecture(tiny(tmp_path, *given, "sglang.enable_watermark=true"), architecture)


def test_a_running_server_that_returns_no_experts_is_named(tmp_path: Path) -> None:
    good, bad, silent = Stub(all_good), Stub(all_good), "http://127.0.0.1:9"
    good.server_info = {"enable_return_routed_experts": True}
    bad.server_info = {"enable_return_routed_experts": False}

    def config(replay: str, *endpoints: str) -> RunConfig:
        return tiny(tmp_path, f"actor.routing_replay={replay}", "rollout.servers=0", f"rollout.endpoints={json.dumps(endpoints)}")

    try:
        checks.check_endpoints(config("server", good.endpoint, silent))
        checks.check_endpoints(config("trainer", bad.endpoint))
        with pytest.raises(ValueError, match=rf"^rollout\.endpoints: {bad.endpoint} returns no experts, expected a server with --enable-"):
            checks.check_endpoints(config("server", good.endpoint, bad.endpoint))
    finally:
        for one in (good, bad):
            one.server.shutdown()
            one.server.server_close()


def test_too_few_gpus_for_servers_and_ranks_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "default_server_python", lambda: Path("python"))
    config = tiny(tmp_path, "rollout.servers=2", "rollout.tp=2")
    machine = replace(detect(), cuda_devices=6)
    checks.check_machine(config, machine)  # 2 ranks + 2 servers of 2
    with pytest.raises(ValueError, match=r"^world_size: 2 ranks and 2 servers of 2 GPUs need 6, this machine has 5; expected fewer"):
        checks.check_machine(config, replace(machine, cuda_devices=5))
    with pytest.raises(ValueError, match=r"^rollout\.tp: 2, expected 1 on a CPU$"):
        checks.check_machine(config, replace(machine, cuda_devices=0))
    checks.check_machine(tiny(tmp_path), replace(machine, cuda_devices=0))
