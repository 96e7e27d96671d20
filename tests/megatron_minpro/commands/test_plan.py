"""`minpro plan` from the outside: what it prints, and one line with exit code 2 for what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_minpro import cli

PUBLISHED = [
    "configs/qwen3_30b_a3b.yaml",
    *("parallel.tp=1", "parallel.cp=1", "parallel.ep=16"),
    *("--world-size", "16", "--global-batch", "1024"),
]
FASTEST = [*PUBLISHED, "--recipe", "fastest"]
QWEN_235B = ["configs/qwen3_235b_a22b.yaml", "--global-batch", "2048", "parallel.cp=1", "parallel.ep=8"]


def plan(*arguments: str) -> int:
    return cli.run(["plan", *arguments])


def test_json_holds_the_published_step_of_qwen3_30b(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(*FASTEST, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["step_s"] == pytest.approx(20.147, rel=0.10)
    assert found["tokens_per_s_per_gpu"] == pytest.approx(13011, rel=0.10)
    assert found["tflops_per_gpu"] == pytest.approx(299.35, rel=0.10)
    stage = found["memory_gb"][0]
    assert stage["total"] == pytest.approx(62.5, rel=0.05)
    parts = (
        *("parameters", "gradients", "optimizer", "activations", "recomputed", "logits"),
        *("dispatch", "context", "temporary", "rollout", "kept"),
    )
    assert sum(stage[part] for part in parts) == pytest.approx(stage["total"])
    assert found["fits"]


def test_a_plain_step_is_planned_as_the_configuration_trains(capsys: pytest.CaptureFixture[str]) -> None:
    """The layout was published with 167 TFLOP/s, by a recipe without the newest switches."""
    tflops = {}
    for recipe in ("run", "fastest"):
        assert plan(*QWEN_235B, "parallel.tp=4", "parallel.pp=8", "parallel.vpp=4", "--recipe", recipe, "--json") == 0
        found = json.loads(capsys.readouterr().out)
        tflops[recipe] = found["tflops_per_gpu"]
        assert [sum(stage["layers"]) for stage in found["memory_gb"]] == [11, *[12] * 6, 11]
    assert tflops["run"] == pytest.approx(167, rel=0.10)
    assert tflops["fastest"] > 1.5 * tflops["run"]
    assert plan(*QWEN_235B, "parallel.pp=32", "parallel.vpp=3", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [stage["layers"] for stage in found["memory_gb"]] == [[0, 1, 1], *[[1, 1, 1]] * 30, [1, 1, 0]]
    assert (found["dispatcher"], found["recompute"], found["overlap"], found["cuda_graphs"]) == ("alltoall", "full", False, "none")


@pytest.mark.parametrize("config", ["qwen3_30b_a3b", "qwen3_235b_a22b", "qwen3_8b", "tiny_moe_cpu"])
def test_every_config_is_planned_without_weights(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(f"configs/{config}.yaml", "--hardware", "h200") == 0
    shown = capsys.readouterr().out
    assert "memory per GPU" in shown and "tokens/s/GPU" in shown and "global step" in shown


def test_lengths_of_a_run_give_serial_and_overlapped_time_and_the_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lengths = tmp_path / "step_000000.jsonl"
    lengths.write_text("".join(f'{{"num_response_tokens": {tokens}}}\n' for tokens in range(100, 20000, 100)))
    arguments = ["configs/qwen3_30b_a3b.yaml", "rollout.servers=16", "--lengths", str(lengths)]
    assert plan(*arguments) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "serial: " in shown and "overlapped: " in shown
    assert "no other split of the 48 GPUs in whole nodes that fits makes the step shorter" in shown  # 8 GPUs cannot train it
    assert "199 responses of" in shown and " kept " in shown
    assert plan(*arguments, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    found = document["rl"]
    assert [(split["world_size"], split["servers"]) for split in document["splits"]] == [(16, 16), (32, 8)]
    assert document["splits"][0]["step_s"] == found["global_step_s"] < document["splits"][1]["step_s"]
    assert found["global_step_s"] == found["overlapped"]["step_s"] < found["serial"]["step_s"]
    assert plan(*arguments, "rollout.publish=rolling", "--json") == 0
    rolling = json.loads(capsys.readouterr().out)["rl"]
    assert rolling["schedule"] == "rolling" and rolling["global_step_s"] == found["rolling"]["step_s"] < found["overlapped"]["step_s"]
    assert plan(*arguments, "actor.kept_weights=pinned_host", "--json") == 0
    assert json.loads(capsys.readouterr().out)["memory_gb"][0]["kept"] == 0


def test_memory_is_said_in_the_unit_of_its_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("configs/tiny_moe_cpu.yaml") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "memory per GPU, MB" in shown and "largest part: activations, 0.0 GB" not in shown
    listed = shown.partition(" activations ")[2].split()[0]
    assert f"largest part: activations, {listed} MB" in shown


def test_what_does_not_fit_comes_with_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("configs/qwen3_30b_a3b.yaml", "actor.recompute=none", "--layers", "fused") == 0
    shown = capsys.readouterr().out
    assert "does not fit" in shown and "activations" in shown and ", fits," in shown


def test_a_search_prints_layouts_and_draws_the_front(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "front.png"
    assert plan("configs/qwen3_30b_a3b.yaml", "--search", "--world-size", "16", "--plot", str(picture), "--json", "--top", "3") == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["fitting"]) == 3 and found["front"]
    assert picture.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["configs/qwen3_30b_a3b.yaml", "parallel.tp=8", "parallel.cp=1"], "tp=8 does not divide 4 key-value heads"),
        (["configs/qwen3_30b_a3b.yaml", "parallel.pp=3"], "world_size=16 is not a multiple"),
        (["configs/qwen3_30b_a3b.yaml", "--hardware", "gb20"], "did you mean 'gb200'"),
        (["configs/qwen3_30b_a3b.yaml", "--precision", "mxfp8"], "mxfp8 is not one of h100's"),
        (["configs/qwen3_30b_a3b.yaml", "--dispatcher", "deep"], "did you mean 'deepep'"),
        (["configs/qwen3_30b_a3b.yaml", "model.path=models/Qwen3-31B-A3B"], "does not exist and no shipped sizes"),
        (["configs/qwen3_30b_a3b.yaml", "--model-config", "absent.json"], "absent.json: cannot be read"),
        (["configs/qwen3_235b_a22b.yaml", "--search", "--world-size", "8"], "GB too much; largest part: optimizer"),
        (["configs/qwen3_30b_a3b.yaml", "--plot", "front.png"], "--plot needs --search"),
        (["configs/qwen3_30b_a3b.yaml", "--top", "3"], "--top needs --search"),
        (["configs/qwen3_30b_a3b.yaml", "--sequence-length", "4096"], "--sequence-length needs --global-batch"),
        (["configs/qwen3_30b_a3b.yaml", "--micro-batch", "1"], "--micro-batch needs --global-batch"),
        (["configs/qwen3_30b_a3b.yaml", "--recipe", "fastest"], "--recipe needs --global-batch"),
        ([*PUBLISHED, "--recipe", "fast"], "--recipe: 'fast' is not known; did you mean 'fastest'? known: run, fastest"),
        (
            ["configs/qwen3_235b_a22b.yaml", "parallel.pp=8", "parallel.count_embedding_as_layer=false"],
            "parallel: pp=8 does not divide 94 layers and the loss; set parallel.count_embedding_as_layer=true parallel.count_",
        ),
        (
            ["configs/qwen3_30b_a3b.yaml", "parallel.pp=2", "parallel.ep=8", "parallel.cp=1", "parallel.layers_per_stage=[20,20]"],
            "parallel: layers_per_stage adds up to 40 layers, expected 48",
        ),
        (
            ["configs/qwen3_30b_a3b.yaml", "parallel.layers_per_stage=[20,28]"],
            "parallel: layers_per_stage=[20, 28] has 2 numbers, expected pp=1",
        ),
        ([*PUBLISHED, "--mean-tokens", "9"], "--mean-tokens is about sampling"),
        ([*PUBLISHED, "--lengths", "x.jsonl"], "--lengths is about sampling"),
        (["configs/qwen3_30b_a3b.yaml", "--lengths", "x.jsonl", "--mean-tokens", "9"], "--mean-tokens says what --lengths says"),
        (["configs/qwen3_30b_a3b.yaml", "--lengths", "absent.jsonl"], "--lengths: absent.jsonl: expected a run's rollouts"),
        ([*PUBLISHED, "--colocated"], "--colocated is about sampling"),
        (["configs/qwen3_30b_a3b.yaml", "--search", "parallel.ep=16"], "parallel.ep=16 says what --search is to find; leave it out"),
        ([], "CONFIG is missing"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(*arguments) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1
    assert expected in errors[0]
