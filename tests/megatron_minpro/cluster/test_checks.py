"""Input that cannot work is refused before a process starts, naming the key, the value and what was expected."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_minpro.cluster import checks
from megatron_minpro.config import RunConfig, load_config
from megatron_minpro.run import base_model
from parallel.capabilities import detect

REPOSITORY = Path(__file__).resolve().parents[3]


def tiny(folder: Path, *overrides: str) -> RunConfig:
    return load_config(REPOSITORY / "configs/tiny_moe_cpu.yaml", [f"model.path={folder}/model", "prompts.max_prompt_tokens=64", *overrides])


def test_a_model_that_is_still_to_be_made_is_checked_already(tmp_path: Path) -> None:
    architecture = checks.check_settings(tiny(tmp_path))
    assert architecture is not None
    assert (architecture.num_experts, architecture.hidden_size) == (8, 64)
    checks.check_model(tiny(tmp_path))
    with pytest.raises(ValueError, match=r"^parallel: ep=3 does not divide 8 experts$"):
        checks.check_settings(tiny(tmp_path, "world_size=3", "parallel.ep=3"))


def test_a_missing_model_is_refused(tmp_path: Path) -> None:
    config = tiny(tmp_path, "model.warm_up=null")
    with pytest.raises(
        ValueError, match=r"^model\.path: .*/model does not exist and model\.warm_up is null; expected a Hugging Face model"
    ):
        checks.check_model(config)
    assert checks.check_settings(config) is None


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match=r"model/config\.json: no such file; expected a Hugging Face model folder"):
        checks.check_settings(tiny(tmp_path))


def test_experts_with_a_tied_head_are_refused_before_they_are_made(tmp_path: Path) -> None:
    # SGLang would sample from a head of random numbers.
    with pytest.raises(ValueError, match=r"^model\.path .*/model: tie_word_embeddings is True in a qwen3_moe model; expected False"):
        checks.check_settings(tiny(tmp_path, "model.warm_up.architecture.tie_word_embeddings=true"))


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match=r"config\.json: model_type is 'llama'; expected 'qwen3' or 'qwen3_moe'$"):
        checks.check_settings(tiny(tmp_path))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["world_size=3", "parallel.ep=3"], r"^parallel: ep=3 does not divide 8 experts$"),
        (["model.warm_up.seed=1"], r"^model\.path: .* was made by another recipe"),
        (
            ["rollout.max_new_tokens=200"],
            r"^rollout\.max_new_tokens: responses of 200 after prompts of up to 64 tokens exceed the model's 256 positions$",
        ),
        (
            ["megatron={moe_router_topkk: 1}"],
            r"^megatron\.moe_router_topkk: the installed megatron-core has no such option; did you mean 'moe_router_topk'",
        ),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    config = tiny(tmp_path)
    base_model.write_initial_model(config.model, config.prompts, tmp_path / "model")
    assert checks.check_settings(config) is not None
    with pytest.raises(ValueError, match=message):
        checks.check_settings(tiny(tmp_path, *overrides))


def test_responses_that_just_fit_the_models_positions_are_accepted(tmp_path: Path) -> None:
    assert checks.check_settings(tiny(tmp_path, "rollout.max_new_tokens=192")) is not None
    with pytest.raises(ValueError, match="exceed the model's 256 positions"):
        checks.check_settings(tiny(tmp_path, "rollout.max_new_tokens=193"))


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


def test_both_prompt_sources_are_read(tmp_path: Path) -> None:
    checks.check_prompts(tiny(tmp_path))
    with pytest.raises(ValueError, match=r"absent\.jsonl"):
        checks.check_prompts(tiny(tmp_path, f"prompts.source={tmp_path}/absent.jsonl", "prompts.options={modulus: 10}"))
    with pytest.raises(ValueError, match=r"^evaluation\.num_prompts: 20, but .* has 10 prompts$"):
        checks.check_prompts(tiny(tmp_path, "evaluation.num_prompts=20", "evaluation.prompts.options.size=10"))
