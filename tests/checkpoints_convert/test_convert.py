"""Conversions both ways: byte-identical round trips, resumption after a kill, and a destination that is whole or absent."""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoints_convert import convert
from checkpoints_convert.convert import hf_to_megatron, megatron_to_hf
from checkpoints_convert.copying import Progress
from checkpoints_convert.hf_config import config_with_both_spellings
from checkpoints_convert.manifest import MANIFEST_FILE, read_manifest
from checkpoints_convert.safetensors_io import SafetensorsReader
from checkpoints_convert.torch_dist_reader import TorchDistReader
from tests.checkpoints_convert.small_models import DENSE, MOE, random_weights, write_model

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {
    "moe": MOE,
    "moe_tied": {**MOE, "tie_word_embeddings": True},
    "dense": DENSE,
    "dense_tied": {**DENSE, "tie_word_embeddings": True},
    "one_group": {**DENSE, "num_key_value_heads": 1},
    "no_grouping": {**MOE, "num_key_value_heads": 4},
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_model(tmp_path / "hf", MOE, random_weights(MOE), max_shard_bytes=40_000)
    return tmp_path / "hf"


def contents(folder: Path, *, but: tuple[str, ...] = (MANIFEST_FILE,)) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in but}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("shard_bytes", [None, 40_000])
def test_round_trip_is_byte_identical_file_by_file(kind: str, shard_bytes: int | None, tmp_path: Path) -> None:
    config = config_with_both_spellings(CONFIGS[kind])
    write_model(tmp_path / "hf", config, random_weights(config), max_shard_bytes=40_000)
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron", workers=3)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", workers=3, max_shard_bytes=shard_bytes)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    assert contents(tmp_path / "back") == contents(tmp_path / "hf")


@pytest.mark.parametrize("moe", [True, False])
@pytest.mark.parametrize("shard_size", ["40KB", "50GB"])
def test_a_folder_saved_by_transformers_comes_back_byte_identical(moe: bool, shard_size: str, tmp_path: Path) -> None:
    """Version 5 deals tensors out in an order of its own; config.json alone gains the spellings of version 4."""
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    )
    shape = {name: DENSE[name] for name in names}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**shape, **experts) if moe else Qwen3Config(**shape))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "hf", max_shard_size=shard_size)
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron", workers=2)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", workers=2, max_shard_bytes=40_000 if shard_size == "40KB" else None)
    expected = contents(tmp_path / "hf")
    config = json.loads(expected.pop("config.json"))
    found = contents(tmp_path / "back")
    assert json.loads(found.pop("config.json")) == config_with_both_spellings(config)
    assert found == expected
    assert (len([name for name in found if name.endswith(".safetensors")]) > 1) == (shard_size == "40KB")


def test_a_stored_copy_of_a_tied_head_comes_back(tmp_path: Path) -> None:
    """Qwen3-0.6B is published like that."""
    config = config_with_both_spellings({**DENSE, "tie_word_embeddings": True})
    weights = random_weights(config)
    write_model(tmp_path / "hf", config, {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]})
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron", workers=2)
    with TorchDistReader(tmp_path / "megatron") as reader:
        assert "output_layer.weight" not in reader.names
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", workers=2)
    assert contents(tmp_path / "back") == contents(tmp_path / "hf")
    write_model(tmp_path / "other", config, {**weights, "lm_head.weight": 2 * weights["model.embed_tokens.weight"]})
    with pytest.raises(ValueError, match=r"'lm_head\.weight' differs from 'model\.embed_tokens\.weight'"):
        hf_to_megatron(tmp_path / "other", tmp_path / "never", workers=2)
    assert not (tmp_path / "never").exists()


def test_stacked_tensors_hold_what_megatron_expects_where_it_expects_it(source: Path, tmp_path: Path) -> None:
    """Row by row by hand: per key-value group its query heads, its key head, its value head; gate above up; both names of the norm."""
    weights = random_weights(MOE)
    hf_to_megatron(source, tmp_path / "megatron", workers=1)
    layer, head, experts = "model.layers.2.", 8, 4
    with TorchDistReader(tmp_path / "megatron") as reader:
        fused = reader.read("decoder.layers.self_attention.linear_qkv.weight")[2]
        q, k, v = (weights[f"{layer}self_attn.{name}_proj.weight"] for name in "qkv")
        rows = [q[:16], k[:head], v[:head], q[16:], k[head:], v[head:]]  # two groups of two query heads
        assert torch.equal(fused, torch.cat(rows))
        for expert in range(experts):
            name = f"{layer}mlp.experts.{expert}."
            gate_up = torch.cat([weights[f"{name}gate_proj.weight"], weights[f"{name}up_proj.weight"]])
            assert torch.equal(reader.read("decoder.layers.mlp.experts.experts.linear_fc1.weight")[2, expert], gate_up)
        norm = weights[f"{layer}post_attention_layernorm.weight"]
        for key in ("decoder.layers.pre_mlp_layernorm.weight", "decoder.layers.mlp.linear_fc1.layer_norm_weight"):
            assert torch.equal(reader.read(key)[2], norm)
        assert torch.equal(
            reader.read("decoder.layers.self_attention.linear_qkv.layer_norm_weight")[2], weights[f"{layer}input_layernorm.weight"]
        )


def test_the_number_of_workers_changes_no_byte(source: Path, tmp_path: Path) -> None:
    for workers in (1, 7):
        hf_to_megatron(source, tmp_path / f"megatron{workers}", workers=workers)
    one, seven = (contents(tmp_path / f"megatron{workers}", but=()) for workers in (1, 7))
    assert one == seven


def test_weights_can_be_cast_and_config_json_says_so(source: Path, tmp_path: Path) -> None:
    hf_to_megatron(source, tmp_path / "megatron", workers=2)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "cast", workers=2, dtype=torch.float32)
    config = json.loads((tmp_path / "cast/config.json").read_bytes())
    assert config["dtype"] == config["torch_dtype"] == "float32"
    with SafetensorsReader(tmp_path / "cast") as reader:
        for name, tensor in random_weights(MOE).items():
            assert torch.equal(reader.read(name), tensor.float())


def test_progress_ends_at_everything(source: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    report = hf_to_megatron(source, tmp_path / "megatron", workers=3, progress=seen.append)
    last = seen[-1]
    assert (last.tensors, last.bytes) == (last.num_tensors, last.num_bytes) == (report.num_tensors, report.num_bytes)
    assert [each.bytes for each in seen] == sorted(each.bytes for each in seen)


def test_an_existing_destination_is_refused_or_replaced(source: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there/config.json").write_text("mine")
    (tmp_path / "there/mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="there: exists already"):
        hf_to_megatron(source, tmp_path / "there", workers=1)
    assert contents(tmp_path / "there") == {"config.json": b"mine", "mine.txt": b"mine"}
    hf_to_megatron(source, tmp_path / "there", workers=1, force=True)
    assert "mine.txt" not in contents(tmp_path / "there")
    with pytest.raises(ValueError, match="expected another place"):
        hf_to_megatron(source, source, workers=1, force=True)


@pytest.mark.parametrize("command", ["hf-to-megatron", "megatron-to-hf"])
def test_force_replaces_checkpoints_and_empty_folders_alone(command: str, source: Path, tmp_path: Path) -> None:
    convert, start = hf_to_megatron, source
    if command == "megatron-to-hf":
        hf_to_megatron(source, tmp_path / "megatron", workers=1)
        convert, start = megatron_to_hf, tmp_path / "megatron"
    work = tmp_path / "work"
    work.mkdir()
    (work / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"work: is to be replaced, but holds neither config.json nor .metadata"):
        convert(start, work, workers=1, force=True)
    assert contents(work) == {"thesis.tex": b"mine"}
    (work / "thesis.tex").unlink()
    convert(start, work, workers=1, force=True)
    convert(start, work, workers=1, force=True)
    assert (work / MANIFEST_FILE).is_file()


def test_a_cast_that_would_turn_a_number_into_infinity_is_refused(tmp_path: Path) -> None:
    weights = random_weights(DENSE)
    weights["model.layers.1.mlp.down_proj.weight"][5, 3] = 70_000.0
    write_model(tmp_path / "hf", DENSE, weights)
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron", workers=1)
    with pytest.raises(ValueError, match=r"'model.layers.1.mlp.down_proj.weight' holds 70144 in rows 0 to 31; .*torch.float16 can hold"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "cast", workers=1, dtype=torch.float16)
    assert not (tmp_path / "cast").exists()


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_left_as_it_was(enabled: bool, source: Path, tmp_path: Path) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        hf_to_megatron(source, tmp_path / "megatron", workers=1)
        assert gc.isenabled() is enabled
        with pytest.raises(ValueError, match="exists already"):
            hf_to_megatron(source, tmp_path / "megatron", workers=1)
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()


def test_an_error_leaves_nothing_and_the_old_destination_as_it_was(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf_to_megatron(source, tmp_path / "megatron", workers=1)
    before = contents(tmp_path / "megatron", but=())

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(OSError, match=r"No space left on device while writing 'embedding.word_embeddings.weight'.*megatron/__0_0.distcp"):
        hf_to_megatron(source, tmp_path / "megatron", workers=2, force=True)
    assert contents(tmp_path / "megatron", but=()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "megatron"]


def test_too_little_space_is_known_before_anything_is_written(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"No space left on device: [\d,]+ bytes are needed, [0-9,]+ are free"):
        hf_to_megatron(source, tmp_path / "megatron", workers=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


KILLED = """
import os, signal, sys
from checkpoints_convert import convert, journal
journal._FLUSH_SECONDS = 0.0   # every item is made durable, so that the kill finds some
direction, source, destination, after = sys.argv[1:]
def progress(each):
    if each.tensors >= int(after):
        os.kill(os.getpid(), signal.SIGKILL)
getattr(convert, direction)(source, destination, workers=1, resume=True, progress=progress)
"""


def kill(direction: str, source: Path, destination: Path, *, after: int) -> None:
    command = [sys.executable, "-c", KILLED, direction, str(source), str(destination), str(after)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.parametrize("direction", ["hf_to_megatron", "megatron_to_hf"])
def test_after_kill_9_only_the_rest_is_done(direction: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    origin = source
    if direction == "megatron_to_hf":
        origin = tmp_path / "megatron"
        hf_to_megatron(source, origin, workers=1)
    getattr(convert, direction)(origin, tmp_path / "whole", workers=1)
    for after in (20, 45):
        kill(direction, origin, tmp_path / "out", after=after)
        assert not (tmp_path / "out").exists()
    read: list[str] = []
    reader = SafetensorsReader if direction == "hf_to_megatron" else convert.MegatronWeights
    original = reader.read_rows
    monkeypatch.setattr(reader, "read_rows", lambda self, name, *rows: (read.append(name), original(self, name, *rows))[1])
    report = getattr(convert, direction)(origin, tmp_path / "out", workers=1, resume=True)
    # The item that was being counted was not yet in the journal; it has three tensors at most.
    assert 42 <= report.resumed_tensors < report.num_tensors == 66
    assert len(set(read)) == report.num_tensors - report.resumed_tensors
    assert contents(tmp_path / "out", but=()) == contents(tmp_path / "whole", but=())
    assert not list(tmp_path.glob(".*"))


def test_a_changed_source_is_not_resumed_but_can_be_started_anew(source: Path, tmp_path: Path) -> None:
    kill("hf_to_megatron", source, tmp_path / "out", after=30)
    weights: dict[str, Tensor] = random_weights(MOE, seed=1)
    shutil.rmtree(source)
    write_model(source, MOE, weights, max_shard_bytes=40_000)
    with pytest.raises(ValueError, match="unfinished conversion of another source"):
        hf_to_megatron(source, tmp_path / "out", workers=1, resume=True)
    hf_to_megatron(source, tmp_path / "out", workers=1)
    with TorchDistReader(tmp_path / "out") as reader:
        assert torch.equal(reader.read("embedding.word_embeddings.weight"), weights["model.embed_tokens.weight"])
    assert not list(tmp_path.glob(".*"))


def test_both_sides_hold_the_same_hashes(source: Path, tmp_path: Path) -> None:
    import xxhash

    hf_to_megatron(source, tmp_path / "megatron", workers=2)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", workers=2)
    first, second = read_manifest(tmp_path / "megatron"), read_manifest(tmp_path / "back")
    assert first is not None
    assert first == second
    for name, tensor in random_weights(MOE).items():
        assert first.tensors[name].digest == xxhash.xxh3_128(tensor.view(torch.uint8).numpy().tobytes()).hexdigest()


def test_a_source_that_its_manifest_contradicts_is_refused(source: Path, tmp_path: Path) -> None:
    hf_to_megatron(source, tmp_path / "megatron", workers=2)
    path = tmp_path / "megatron/__0_0.distcp"
    payload = random_weights(MOE)["model.layers.1.mlp.gate.weight"].view(torch.uint8).numpy().tobytes()
    content = path.read_bytes()
    at = content.index(payload) + 17
    path.write_bytes(content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :])
    with pytest.raises(ValueError, match=r"megatron: 'model\.layers\.1\.mlp\.gate\.weight' has XXH3 hash"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "back", workers=2)
    assert not (tmp_path / "back").exists()
