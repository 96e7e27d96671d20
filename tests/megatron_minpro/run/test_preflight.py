"""What cannot work is refused before anything starts: by a dry run, by the run itself and by a job's first step, in one line."""

from __future__ import annotations

import io
import json
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from checkpoints_convert.hf_config import read_architecture
from checkpoints_convert.policy_folder import load_tokenizer
from megatron_minpro import cli
from megatron_minpro.config import RunConfig, load_config
from megatron_minpro.data.prompts import PromptCursor
from megatron_minpro.data.sources import load_prompts
from megatron_minpro.run import base_model, preflight
from megatron_minpro.run.dry_run import describe
from megatron_minpro.run.run_state import describe_model
from megatron_minpro.tasks.arithmetic_chains.tokenizer import build_tokenizer
from megatron_minpro.tracking.metrics_file import MetricsFile
from parallel.capabilities import detect
from tests.megatron_minpro.run.test_launcher import add_checkpoint

REPOSITORY = Path(__file__).resolve().parents[3]
TINY = REPOSITORY / "configs/tiny_moe_cpu.yaml"
OWN = ("model.warm_up=null", "prompts.options={}", "prompts.question_field=q", "prompts.answer_field=a", "prompts.max_prompt_tokens=64")


@pytest.fixture(autouse=True)
def _server_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks ask only whether its Python is there."""
    monkeypatch.setenv("MINPRO_SERVER_PYTHON", sys.executable)


@pytest.fixture(scope="module")
def made_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model with random weights."""
    folder = tmp_path_factory.mktemp("made") / "model"
    config = tiny(folder.parent)
    base_model.write_initial_model(config.model, config.prompts, folder)
    (folder / base_model.RECIPE_FILE).unlink()
    return folder


@pytest.fixture
def place(tmp_path: Path, made_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with the model and 40 prompts."""
    shutil.copytree(made_model, tmp_path / "model")
    write_rows(tmp_path / "own.jsonl", 40)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tiny(folder: Path, *settings: str) -> RunConfig:
    return load_config(TINY, [f"output_dir={folder}/runs", f"model.path={folder}/model", "name=test", *settings])


def write_rows(path: Path, count: int, **changes: Any) -> None:
    path.write_text("".join(json.dumps({"q": f"{n} + 1 :", "a": str(n + 1)} | changes) + "\n" for n in range(count)))


def dry_run(folder: Path, *settings: str) -> int:
    return cli.run(["train", str(TINY), "--dry-run", f"output_dir={folder}/runs", f"model.path={folder}/model", "name=test", *settings])


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def drop_last_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors")


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def finish_run(folder: Path) -> None:
    config = tiny(folder, "model.warm_up=null")
    config.run_dir.mkdir(parents=True)
    add_checkpoint(config, config.num_global_steps)


def remove_tokenizer(folder: Path) -> None:
    for path in folder.glob("token*"):
        path.unlink()


Change = Callable[[Path], object]
# What is wrong -> how the place is changed, the settings, what the line says.
CASES: dict[str, tuple[Change | None, tuple[str, ...], tuple[str, ...]]] = {
    "csv as source": (
        lambda place: (place / "data.csv").write_text("q,a\n"),
        (*OWN, "prompts.source=data.csv"),
        ("prompts.source = ", "data.csv': .csv is not read", "expected a .jsonl"),
    ),
    "missing prompt file with the warm-up": (
        None,
        ("prompts.source=absent.jsonl", "prompts.options={}", "prompts.question_field=q", "prompts.answer_field=a"),
        ("prompts.source = 'absent.jsonl': no such file",),
    ),
    "missing held-out file": (
        None,
        ("evaluation.prompts={source: absent.jsonl, question_field: q, answer_field: a, max_prompt_tokens: 64}",),
        ("evaluation.prompts.source = 'absent.jsonl': no such file",),
    ),
    "own prompts with a warm-up": (
        lambda place: shutil.rmtree(place / "model"),
        ("prompts.source=own.jsonl", "prompts.options={}", "prompts.question_field=q", "prompts.answer_field=a"),
        ("model.warm_up.examples", "noisy_solutions"),
    ),
    "row without the answer field": (
        lambda place: (place / "own.jsonl").write_text('{"q": "1 + 1 :", "answr": "2"}\n'),
        (*OWN, "prompts.source=own.jsonl"),
        ("own.jsonl: line 1: field 'a' is missing", "answr"),
    ),
    "2 prompts for 32 a step": (
        lambda place: write_rows(place / "own.jsonl", 2),
        (*OWN, "prompts.source=own.jsonl", "rollout.prompts_per_step=32"),
        ("prompts.source: own has 2 prompts, expected at least rollout.prompts_per_step = 32",),
    ),
    "fewer held-out prompts than are measured": (
        None,
        ("model.warm_up=null", "evaluation.num_prompts=20", "evaluation.prompts.options.size=10"),
        ("evaluation.num_prompts: 20", "has 10 prompts"),
    ),
    "prompts that are all too long": (None, (*OWN, "prompts.source=own.jsonl", "prompts.max_prompt_tokens=2"), ("no prompt is left",)),
    "folder without a tokenizer": (
        lambda place: remove_tokenizer(place / "model"),
        ("model.warm_up=null",),
        ("model: holds no tokenizer (tokenizer.json)",),
    ),
    "damaged tokenizer": (
        lambda place: (place / "model/tokenizer.json").write_text("{}"),
        ("model.warm_up=null",),
        ("model: its tokenizer cannot be loaded",),
    ),
    "folder without weights": (
        lambda place: (place / "model/model.safetensors").unlink(),
        ("model.warm_up=null",),
        ("model: holds neither model.safetensors nor model.safetensors.index.json",),
    ),
    "weights as pickles": (
        lambda place: (place / "model/model.safetensors").rename(place / "model/pytorch_model.bin"),
        ("model.warm_up=null",),
        ("pytorch_model.bin: PyTorch pickles are not read",),
    ),
    "truncated weights": (lambda place: truncate(place / "model"), ("model.warm_up=null",), ("model.safetensors", "truncated")),
    "weights without a tensor": (
        lambda place: drop_last_tensor(place / "model"),
        ("model.warm_up=null",),
        ("missing 1: ['model.norm.weight']",),
    ),
    "weights of another shape": (
        lambda place: rewrite(place / "model/config.json", intermediate_size=64, moe_intermediate_size=16),
        ("model.warm_up=null",),
        ("shape of model.layers.0.mlp.experts.0", "expected (16, 64) from the config"),
    ),
    "tokenizer with more tokens than the model": (
        lambda place: build_tokenizer(place / "model", modulus=50),
        ("model.warm_up=null",),
        ("the tokenizer has ", "tokens, vocab_size is 24; expected the model's own tokenizer"),
    ),
    "end token that is a word of the tokenizer": (
        lambda place: rewrite(place / "model/generation_config.json", eos_token_id=[9]),
        ("model.warm_up=null",),
        ("model: the end token 9 is the word", "expected the model's own tokenizer"),
    ),
    "end token beyond the tokenizer": (
        lambda place: rewrite(place / "model/generation_config.json", eos_token_id=[151645]),
        ("model.warm_up=null",),
        ("model: the end token 151645 is beyond its 24 tokens",),
    ),
    "another model family": (
        lambda place: rewrite(place / "model/config.json", model_type="llama"),
        ("model.warm_up=null",),
        ("model/config.json: model_type is 'llama'",),
    ),
    "output folder below a file": (
        lambda place: (place / "runs").write_text(""),
        ("model.warm_up=null",),
        ("output_dir: ", "runs is a file; expected a folder"),
    ),
    "output folder that cannot be written": (
        None,
        ("model.warm_up=null", "output_dir=/proc/runs"),
        ("output_dir: /proc/runs/test cannot be written to",),
    ),
    "replicas inside a server": (
        None,
        ("model.warm_up=null", "sglang.dp_size=2"),
        ("sglang.dp_size: 2: the weight endpoints assert one replica; expected 1",),
    ),
    "tensor parallelism of servers on a CPU": (None, ("model.warm_up=null", "rollout.tp=2"), ("rollout.tp: 2, expected 1 on a CPU",)),
    "misspelt field of the warm-up architecture": (
        lambda place: shutil.rmtree(place / "model"),
        ("model.warm_up.architecture.num_expert=8",),
        ("model.warm_up.architecture.num_expert: no field of Qwen3's configuration; did you mean 'num_experts'?",),
    ),
    "tokenizer folder that is missing": (
        lambda place: shutil.rmtree(place / "model"),
        ("model.warm_up.tokenizer={folder: absent}",),
        ("model.warm_up.tokenizer.folder: ", "absent does not exist"),
    ),
    "finished run with another setting": (
        finish_run,
        ("model.warm_up=null", "seed=5"),
        ("step_000050: of a run with another configuration (seed: 0 there, 5 here)",),
    ),
    "must resume a new run": (None, ("model.warm_up=null", "--resume", "must"), ("has no checkpoint to resume from",)),
    "staleness beyond the number of steps": (
        None,
        ("model.warm_up=null", "num_global_steps=3", "staleness=4"),
        ("staleness = 4", "num_global_steps = 3"),
    ),
    "profile beyond the number of steps": (
        None,
        ("model.warm_up=null", "num_global_steps=5", "profile.steps=4-6"),
        ("profile.steps = '4-6'", "expected steps from 0 to 4"),
    ),
    "experts that do not divide": (
        None,
        ("model.warm_up=null", "world_size=3", "parallel.ep=3"),
        ("parallel: ep=3 does not divide 8 experts",),
    ),
    "key file that is missing": (
        None,
        ("model.warm_up=null", "rollout.api_key_path=absent.key"),
        ("rollout.api_key_path: cannot read", "absent.key"),
    ),
    "responses longer than the model": (
        None,
        ("model.warm_up=null", "rollout.max_new_tokens=300", "actor.max_tokens_per_micro_batch=4096"),
        ("rollout.max_new_tokens: responses of 300", "exceed the model's 256 positions"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_dry_run_refuses(case: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, settings, words = CASES[case]
    if change is not None:
        change(place)
    before = sorted(place.rglob("*"))
    assert dry_run(place, *settings) == 2, capsys.readouterr()
    captured = capsys.readouterr()
    assert captured.err.startswith("minpro: error: ") and captured.err.count("\n") == 1 and captured.out == ""
    assert all(word in captured.err for word in words), captured.err
    assert sorted(place.rglob("*")) == before


def test_a_dry_run_accepts_what_the_cases_start_from(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for settings in (("model.warm_up=null",), (*OWN, "prompts.source=own.jsonl")):
        assert dry_run(place, *settings) == 0, capsys.readouterr().err
        assert "not checked" not in capsys.readouterr().out


def test_a_run_is_not_continued_on_other_labels(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = (*OWN, "prompts.source=own.jsonl")
    config = tiny(place, *settings)
    source, _ = load_prompts(tokenizer=load_tokenizer(place / "model"), **config.prompts.model_dump())
    cursor = PromptCursor(source, seed=config.seed)
    cursor.next(8)
    add_checkpoint(config, 1, cursor=cursor.state(), model=describe_model(read_architecture(place / "model")))
    assert dry_run(place, *settings) == 0, capsys.readouterr().err
    write_rows(place / "own.jsonl", 40, a="7")
    capsys.readouterr()
    assert dry_run(place, *settings) == 2
    assert "prompt cursor: the labels and rows of source 'own' have changed since the run was saved" in capsys.readouterr().err


def test_a_port_in_use_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert dry_run(place, "model.warm_up=null", f"rollout.base_port={port}") == 2
    assert f"rollout.base_port: port {port} on 127.0.0.1 cannot be used" in capsys.readouterr().err


def test_the_run_itself_refuses_the_same(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truncate(place / "model")
    arguments = [str(TINY), f"output_dir={place}/runs", f"model.path={place}/model", "name=test", "model.warm_up=null"]
    for mode in ([], ["--prepare"]):
        assert cli.run(["train", *arguments, *mode]) == 2
        assert "truncated" in capsys.readouterr().err
    assert not (place / "runs").exists()


def shown(folder: Path, *settings: str) -> str:
    text = io.StringIO()
    Console(file=text, width=300).print(describe(tiny(folder, *settings), resume="auto"))
    return text.getvalue()


def test_what_is_not_on_this_machine_is_named(tmp_path: Path) -> None:
    text = shown(tmp_path, *OWN, f"prompts.source={tmp_path}/absent.parquet", "rollout.tp=2", "rollout.api_key_path=k")
    lines = [line for line in text.splitlines() if line.startswith("not checked: ")]
    assert len(lines) == 4 and "not on this machine, so its shape and the layout's fit are not checked" in lines[0]
    assert "GPUs" in lines[1] and "absent.parquet is not on this machine" in lines[2] and "rollout.api_key_path" in lines[3]


def test_rows_that_are_here_are_checked_without_the_model(tmp_path: Path) -> None:
    write_rows(tmp_path / "own.jsonl", 2)
    with pytest.raises(ValueError, match=r"own\.jsonl has 2 prompts, expected at least rollout\.prompts_per_step"):
        shown(tmp_path, *OWN, f"prompts.source={tmp_path}/own.jsonl")
    write_rows(tmp_path / "own.jsonl", 40, a=None)
    (tmp_path / "own.jsonl").write_text('{"q": "1"}\n')
    with pytest.raises(ValueError, match=r"own\.jsonl: line 1: field 'a' is missing"):
        shown(tmp_path, *OWN, f"prompts.source={tmp_path}/own.jsonl")


def test_a_hub_data_set_is_not_read_by_a_dry_run(place: Path) -> None:
    text = shown(place, *OWN, "prompts.source=owner/name", "prompts.options={split: train}")
    assert "not checked: prompts.source owner/name is a Hugging Face data set, which is not read" in text


def test_a_missing_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^model\.path: .*/model does not exist and model\.warm_up is null; expected a Hugging Face"):
        preflight.check_start(tiny(tmp_path, "model.warm_up=null"), resume="auto", capabilities=detect(), machine=True)


def test_responses_that_just_fit_the_models_positions_are_accepted(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fitting = ("model.warm_up=null", "prompts.max_prompt_tokens=64")
    assert dry_run(place, *fitting, "rollout.max_new_tokens=192") == 0
    assert dry_run(place, *fitting, "rollout.max_new_tokens=193") == 2
    assert "exceed the model's 256 positions" in capsys.readouterr().err


def test_a_model_that_is_still_to_be_made_is_checked_already(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dry_run(tmp_path) == 0
    assert "2 layers of 64, 8 experts, to be made" in " ".join(capsys.readouterr().out.split())
    assert dry_run(tmp_path, "world_size=3", "parallel.ep=3") == 2
    assert "parallel: ep=3 does not divide 8 experts" in capsys.readouterr().err


def test_the_resolved_configuration_stands_in_the_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [f"output_dir={tmp_path}", "name=job", "seed=5", f"model.path={tmp_path / 'model'}"]
    assert cli.run(["train", str(TINY), "--prepare", *settings]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'job'}\n"
    assert load_config(tmp_path / "job/config.yaml", []) == load_config(TINY, settings)


def test_a_jobs_first_step_says_what_earlier_attempts_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [f"output_dir={tmp_path}", "name=job", f"model.path={tmp_path / 'model'}", "checkpoint.stop_within_s=1500"]
    with MetricsFile(tmp_path / "job") as file:
        file.log(0, {"time/longest_update": 1100.0, "time/checkpoint": 500.0})
        file.log(1, {"time/score": 100.0, "time/checkpoint": 500.0})
    assert cli.run(["train", str(TINY), "--prepare", *settings]) == 0
    said = capsys.readouterr().err
    assert said.startswith("minpro: a stop takes up to 1600 s (an update 1100.0 s, a checkpoint 500.0 s)") and said.count("\n") == 1
    assert cli.run(["train", str(TINY), "--prepare", *settings, "checkpoint.stop_within_s=1600"]) == 0
    assert capsys.readouterr().err == ""


def test_a_job_of_several_machines_is_not_judged_by_this_ones_gpus(place: Path) -> None:
    config = tiny(place, "model.warm_up=null", "rollout.tp=2")
    preflight.check_start(config, resume="auto", capabilities=detect(), machine=False)
    with pytest.raises(ValueError, match=r"rollout\.tp: 2, expected 1 on a CPU"):
        preflight.check_start(config, resume="auto", capabilities=detect(), machine=True)
