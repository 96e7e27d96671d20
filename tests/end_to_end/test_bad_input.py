"""Wrong input: exit code 2, one line that names the culprit, nothing started, nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_minpro.cli import run

TINY = "configs/tiny_moe_cpu.yaml"


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).resolve().parents[2])


def qwen2_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "qwen2"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    return folder


CASES = {
    "misspelt key": (["actor.updates_per_stp=4"], ["actor.updates_per_stp", "updates_per_step"]),
    "wrong type": (["staleness=two"], ["staleness", "two"]),
    "out of range": (["staleness=-1"], ["staleness", "-1"]),
    "unknown objective": (["objective.name=mnpro"], ["mnpro", "minpro"]),
    "unknown objective option": (["objective.clip_hgh=3"], ["clip_hgh", "clip_high"]),
    "world size and layout disagree": (["parallel.tp=3"], ["tp*pp*cp", "world_size"]),
    "experts do not divide": (["world_size=3", "parallel.ep=3", "rollout.prompts_per_step=48"], ["ep=3", "8 experts"]),
    "heads do not divide": (["world_size=8", "parallel.tp=8", "parallel.ep=1"], ["tp=8", "heads"]),
    "model folder is missing": (["model.path=/nowhere/at/all", "model.warm_up=null"], ["/nowhere/at/all"]),
    "mini-batches do not divide": (["actor.updates_per_step=5"], ["updates_per_step", "prompts_per_step"]),
    "truncated sampling": (["rollout.top_p=0.9"], ["top_p"]),
    "open address without keys": (["rollout.host=0.0.0.0"], ["host", "key"]),
    "unknown Megatron option": (["megatron.moe_ruter_topk=2"], ["moe_ruter_topk", "moe_router_topk"]),
    "Megatron's own replay": (["megatron.moe_enable_routing_replay=true"], ["moe_enable_routing_replay", "actor.routing_replay"]),
    "replay of a recomputed router": (
        ["actor.routing_replay=trainer", "actor.recompute=selective", "megatron.recompute_modules=[moe]"],
        ["actor.routing_replay = 'trainer'", "recompute_modules"],
    ),
    "replay of servers that return no experts": (
        ["actor.routing_replay=server", "sglang.enable_lmcache=true"],
        ["actor.routing_replay = 'server'", "sglang.enable_lmcache", "expected false"],
    ),
    "unknown SGLang option": (["sglang.mem_fraction_sttic=0.5"], ["mem_fraction_sttic", "mem_fraction_static"]),
    "unknown prompt generator option": (["prompts.options.modulos=7"], ["modulos"]),
}


@pytest.mark.parametrize("case", CASES)
def test_wrong_settings_are_one_line(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides, words = CASES[case]
    if case in ("experts do not divide", "heads do not divide"):
        overrides = [*overrides, "model.warm_up.architecture.vocab_size=24"]
    code = run(["train", TINY, f"output_dir={tmp_path}", f"model.path={tmp_path / 'base'}", *overrides])
    error = capsys.readouterr().err
    assert code == 2, error
    assert len(error.strip().splitlines()) == 1 and error.startswith("minpro: error: ")
    assert all(word in error for word in words), error
    assert list(tmp_path.iterdir()) == []


def test_another_model_family_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = qwen2_folder(tmp_path)
    code = run(["train", TINY, f"model.path={folder}", "model.warm_up=null", f"output_dir={tmp_path / 'runs'}"])
    error = capsys.readouterr().err
    assert code == 2 and "model_type is 'qwen2'" in error and str(folder) in error
    assert not (tmp_path / "runs").exists()


def test_a_dataset_without_the_named_field_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"question": "1 + 1", "answr": "2"}) + "\n")
    prompts = ["prompts.options={}", f"prompts.source={rows}", "prompts.question_field=question", "prompts.answer_field=answer"]
    code = run(["train", TINY, f"output_dir={tmp_path / 'runs'}", f"model.path={tmp_path / 'base'}", "model.warm_up.num_steps=0", *prompts])
    error = capsys.readouterr().err
    assert code == 2, error
    assert "rows.jsonl" in error and "answer" in error and "answr" in error
    assert len(error.strip().splitlines()) == 1


def test_prompts_that_are_all_too_long_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = run(["train", TINY, f"output_dir={tmp_path / 'runs'}", f"model.path={tmp_path / 'base'}", "prompts.max_prompt_tokens=4"])
    error = capsys.readouterr().err
    assert code == 2 and "max_prompt_tokens" in error and len(error.strip().splitlines()) == 1
