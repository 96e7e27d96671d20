from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import signal
import struct
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from checkpoints_convert.dtypes import DTYPES as NAMED_DTYPES
from checkpoints_convert.hf_config import Architecture, config_with_both_spellings, read_config
from checkpoints_convert.mapping import check_hf_tensors, hf_shapes, parameters
from checkpoints_convert.safetensors_format import INDEX_FILE, SINGLE_FILE, file_bytes, index_content, plan_shards
from checkpoints_convert.safetensors_io import SafetensorsReader, write_checkpoint

DTYPES = (torch.bool, torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2, torch.int16, torch.float16, torch.bfloat16,
          torch.int32, torch.float32, torch.float64, torch.int64)  # fmt: skip


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    flat = torch.randint(0, 256, (torch.Size(shape).numel() * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    return flat.view(dtype).reshape(shape)


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def specs_of(tensors: dict[str, Tensor]) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    return [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]


def write(directory: Path, tensors: dict[str, Tensor], *, max_shard_bytes: int = 10**9, **options: Any) -> None:
    write_checkpoint(directory, tensors.items(), specs=specs_of(tensors), max_shard_bytes=max_shard_bytes, **{"extra_files": {}, **options})


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    """Six tensors of 96 bytes and one of 32."""
    named = {f"layer.{number}.weight": random_tensor((3, 4), torch.float64, number) for number in range(6)}
    return named | {"norm.weight": random_tensor((16,), torch.bfloat16, 9)}


# Reading


def test_single_file_of_the_library_reads_bit_for_bit(tmp_path: Path) -> None:
    tensors = {f"{dtype}": random_tensor((3, 5), dtype, seed) for seed, dtype in enumerate(DTYPES)}
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 4, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / SINGLE_FILE, metadata={"format": "pt"})
    with SafetensorsReader(tmp_path) as reader:
        assert set(reader.names) == set(tensors)
        for name, tensor in tensors.items():
            assert (reader.shape(name), reader.dtype(name)) == (tuple(tensor.shape), tensor.dtype)
            assert bits(reader.read(name)) == bits(tensor)
            assert reader.file(name) == tmp_path / SINGLE_FILE


def test_rows_are_read_alone(tmp_path: Path) -> None:
    tensor = random_tensor((7, 3), torch.bfloat16, 0)
    save_file({"w": tensor, "v": tensor.flip(0).contiguous()}, tmp_path / SINGLE_FILE)
    with SafetensorsReader(tmp_path) as reader:
        for start, end in [(0, 7), (2, 5), (6, 7), (3, 3)]:
            assert bits(reader.read_rows("w", start, end)) == bits(tensor[start:end])
        with pytest.raises(ValueError, match=r"rows 5 to 8 of w asked for; expected rows inside its shape \(7, 3\)"):
            reader.read_rows("w", 5, 8)


def test_tensor_that_is_read_owns_its_memory(tmp_path: Path) -> None:
    save_file({"w": torch.ones(4)}, tmp_path / SINGLE_FILE)
    with SafetensorsReader(tmp_path) as reader:
        reader.read("w").zero_()
        assert reader.read("w").tolist() == [1.0] * 4


def test_missing_tensor_is_named_with_its_nearest_names(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    write(tmp_path / "x", tensors)
    with SafetensorsReader(tmp_path / "x") as reader, pytest.raises(ValueError, match=r"x: tensor 'norm.wight' is missing.*norm.weight"):
        reader.read("norm.wight")


def test_closed_reader_refuses_to_read(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    write(tmp_path / "x", tensors)
    with SafetensorsReader(tmp_path / "x") as reader:
        pass
    with pytest.raises(ValueError, match="is closed"):
        reader.read("norm.weight")


def test_file_that_shrinks_after_opening_is_an_error(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    write(tmp_path / "x", tensors)
    path = tmp_path / "x" / SINGLE_FILE
    with SafetensorsReader(tmp_path / "x") as reader:
        os.truncate(path, path.stat().st_size - 40)
        with pytest.raises(ValueError, match=r"model.safetensors: ends inside tensor 'norm.weight'; expected 32 more bytes"):
            reader.read("norm.weight")


def edit_header(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change the header and keep the payload."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def truncated_by(count: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, path.stat().st_size - count)


def with_entry(key: str, value: Any) -> Callable[[Path], None]:
    return lambda path: edit_header(path, lambda header: header["norm.weight"].__setitem__(key, value))


def with_raw_header(text: bytes) -> Callable[[Path], int]:
    return lambda path: path.write_bytes(struct.pack("<Q", len(text)) + text)


def with_flipped_length(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[6] ^= 0x40
    path.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "one byte short": (truncated_by(1), "truncated; expected"),
    "cut inside the header": (lambda path: os.truncate(path, 100), "truncated, or not a safetensors file"),
    "cut to seven bytes": (lambda path: os.truncate(path, 7), "is 7 bytes long"),
    "empty file": (lambda path: os.truncate(path, 0), "is 0 bytes long"),
    "one byte too long": (lambda path: path.write_bytes(path.read_bytes() + b"x"), "followed by other bytes"),
    "a flipped bit in the header length": (with_flipped_length, "announces a header of"),
    "another shape": (with_entry("shape", [17]), "'norm.weight' lies at bytes 576 to 608; expected 576 to 610"),
    "another dtype": (with_entry("dtype", "F32"), "'norm.weight' lies at bytes 576 to 608; expected 576 to 640"),
    "an unknown dtype": (with_entry("dtype", "F3"), "dtype is 'F3'"),
    "a negative length": (with_entry("shape", [-16]), "'norm.weight' is malformed"),
    "a fractional offset": (with_entry("data_offsets", [576.0, 608]), "'norm.weight' is malformed"),
    "an overlap": (with_entry("data_offsets", [544, 576]), "lies at bytes 544 to 576; expected 576 to 608"),
    "a hole": (with_entry("data_offsets", [577, 609]), "expected 576 to 608"),
    "an unknown entry key": (with_entry("strides", [1]), "'norm.weight' is malformed"),
    "a header that is not JSON": (with_raw_header(b'{"a": '), "not valid JSON"),
    "a header that is not text": (with_raw_header(b"\xff\xfe{}"), "not valid JSON"),
    "a header that is a list": (with_raw_header(b"[]"), "holds a JSON list"),
    "a repeated name": (with_raw_header(b'{"a": 1, "b": 2, "a": 3}'), "key 'a' appears twice"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_file_is_refused_when_opened(tmp_path: Path, tensors: dict[str, Tensor], damage: str) -> None:
    write(tmp_path / "x", tensors)
    inflict, message = DAMAGE[damage]
    inflict(tmp_path / "x" / SINGLE_FILE)
    with pytest.raises(ValueError, match=message) as error:
        SafetensorsReader(tmp_path / "x")
    assert str(tmp_path / "x" / SINGLE_FILE) in str(error.value) and "\n" not in str(error.value)


def edit_index(directory: Path, edit: Callable[[dict[str, str]], Any]) -> None:
    index = json.loads((directory / INDEX_FILE).read_text())
    edit(index["weight_map"])
    (directory / INDEX_FILE).write_text(json.dumps(index))


INDEX_DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "an absent file": (lambda d: (d / "model-00002-of-00004.safetensors").unlink(), "places 2 tensors in model-00002-of-00004.safetensors"),
    "an absent tensor": (
        lambda d: edit_index(d, lambda m: m.__setitem__("layer.9.weight", "model-00001-of-00004.safetensors")),
        "places tensor 'layer.9.weight' in model-00001",
    ),
    "a tensor not listed": (lambda d: edit_index(d, lambda m: m.pop("layer.0.weight")), "holds tensor 'layer.0.weight'.*it says None"),
    "a tensor elsewhere": (
        lambda d: edit_index(d, lambda m: m.__setitem__("layer.0.weight", "model-00004-of-00004.safetensors")),
        "holds tensor 'layer.0.weight'.*it says model-00004",
    ),
    "a path outside the folder": (
        lambda d: edit_index(d, lambda m: m.__setitem__("layer.0.weight", "../model.safetensors")),
        "places tensor 'layer.0.weight' in '../model.safetensors'; expected the name",
    ),
    "no weight map": (lambda d: (d / INDEX_FILE).write_text("{}"), "weight_map is missing or empty"),
    "two kinds of weights": (lambda d: (d / SINGLE_FILE).touch(), "holds both"),
    "a tensor in two files": (
        lambda d: (d / "model-00002-of-00004.safetensors").write_bytes((d / "model-00001-of-00004.safetensors").read_bytes()),
        "which model-00001-of-00004.safetensors holds too",
    ),
}


@pytest.mark.parametrize("damage", INDEX_DAMAGE)
def test_index_that_disagrees_with_the_files_is_refused(tmp_path: Path, tensors: dict[str, Tensor], damage: str) -> None:
    write(tmp_path / "x", tensors, max_shard_bytes=200)
    inflict, message = INDEX_DAMAGE[damage]
    inflict(tmp_path / "x")
    with pytest.raises(ValueError, match=message):
        SafetensorsReader(tmp_path / "x")


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds neither model.safetensors nor"):
        SafetensorsReader(tmp_path)
    with pytest.raises(ValueError, match="absent: no such directory"):
        SafetensorsReader(tmp_path / "absent")


def test_failed_open_leaves_no_file_open(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    write(tmp_path / "x", tensors, max_shard_bytes=200)
    truncated_by(1)(tmp_path / "x" / "model-00004-of-00004.safetensors")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ValueError, match="truncated"):
        SafetensorsReader(tmp_path / "x")
    assert len(os.listdir("/proc/self/fd")) == before


# Writing


def test_single_file_equals_the_librarys_byte_for_byte(tmp_path: Path) -> None:
    tensors = {f"weight of {dtype} é": random_tensor((3, 5), dtype, seed) for seed, dtype in enumerate(DTYPES)}
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 4, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "expected", metadata={"format": "pt"})
    write(tmp_path / "x", tensors)
    assert (tmp_path / "x" / SINGLE_FILE).read_bytes() == (tmp_path / "expected").read_bytes()
    assert os.listdir(tmp_path / "x") == [SINGLE_FILE]


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_order_and_shard_size_gives_the_files_of_huggingface_hub(data: st.DataObject, tmp_path_factory: Any) -> None:
    tmp_path = tmp_path_factory.mktemp("order")
    # No empty tensors: they all have the address 0, which the reference takes for shared memory.
    shapes = data.draw(st.lists(st.lists(st.integers(1, 5), max_size=3).map(tuple), min_size=1, max_size=12))
    dtypes = data.draw(st.lists(st.sampled_from(DTYPES), min_size=len(shapes), max_size=len(shapes)))
    limit = data.draw(st.integers(1, 400))
    tensors = {
        f"t.{number}.w": random_tensor(shape, dtype, number) for number, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
    }
    expected = split_torch_state_dict_into_shards(tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=limit)
    arrival = list(tensors.items())
    random.Random(data.draw(st.integers(0, 9))).shuffle(arrival)
    write_checkpoint(tmp_path / "x", arrival, specs=specs_of(tensors), max_shard_bytes=limit, extra_files={})
    names = set(expected.filename_to_tensors) | ({INDEX_FILE} if expected.is_sharded else set())
    assert set(os.listdir(tmp_path / "x")) == names
    for file_name, members in expected.filename_to_tensors.items():
        save_file({name: tensors[name] for name in members}, tmp_path / "expected", metadata={"format": "pt"})
        assert (tmp_path / "x" / file_name).read_bytes() == (tmp_path / "expected").read_bytes()
    if expected.is_sharded:
        index = json.loads((tmp_path / "x" / INDEX_FILE).read_text())
        assert index == {
            "metadata": {"total_size": expected.metadata["total_size"]},
            "weight_map": expected.tensor_to_filename,
        }
    with SafetensorsReader(tmp_path / "x") as reader:
        assert {name: bits(reader.read(name)) for name in reader.names} == {name: bits(tensor) for name, tensor in tensors.items()}


def test_written_shards_open_in_the_library(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    write(tmp_path / "x", tensors, max_shard_bytes=200, extra_files={"config.json": b"{}"})
    assert (tmp_path / "x" / "config.json").read_bytes() == b"{}"
    seen: dict[str, bytes] = {}
    for path in sorted((tmp_path / "x").glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            seen |= {name: bits(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    assert seen == {name: bits(tensor) for name, tensor in tensors.items()}


def test_non_contiguous_and_gradient_tensors_are_written_as_their_values(tmp_path: Path) -> None:
    tensor = torch.arange(12.0).view(3, 4)
    write(tmp_path / "x", {"t": tensor.T, "p": torch.nn.Parameter(tensor), "c": tensor[:, 1:3], "e": torch.ones(1).expand(5)})
    with SafetensorsReader(tmp_path / "x") as reader:
        assert torch.equal(reader.read("t"), tensor.T) and torch.equal(reader.read("p"), tensor)
        assert torch.equal(reader.read("c"), tensor[:, 1:3]) and torch.equal(reader.read("e"), torch.ones(5))


def test_published_30b_shards_reproduce_to_the_byte(assets: Path) -> None:
    folder = assets / "models" / "qwen3_30b_a3b"
    architecture = Architecture.from_config(read_config(folder), source=folder)
    assert architecture.dtype is not None
    shards = plan_shards(
        ((name, shape, NAMED_DTYPES[architecture.dtype]) for name, shape in hf_shapes(architecture).items()), max_shard_bytes=4_000_000_000
    )
    sizes = json.loads((folder / "shard_file_sizes.json").read_text())
    assert {name: file_bytes(specs) for name, specs in shards.items()} == sizes
    assert index_content(shards) == (folder / INDEX_FILE).read_bytes()


MISTAKES: dict[str, tuple[Callable[[dict[str, Tensor]], Iterator[tuple[str, Tensor]]], str]] = {
    "a missing tensor": (lambda t: iter([*t.items()][:-1]), r"1 tensors were never given, the first: \['norm.weight'\]"),
    "no tensor at all": (lambda t: iter(()), "7 tensors were never given"),
    "an extra tensor": (lambda t: iter([*t.items(), ("norm.wight", torch.ones(1))]), "'norm.wight' is not part of this checkpoint"),
    "a repeated tensor": (lambda t: iter([*t.items(), ("norm.weight", t["norm.weight"])]), "'norm.weight' was given twice"),
    "another shape": (
        lambda t: iter((t | {"norm.weight": t["norm.weight"].view(4, 4)}).items()),
        r"'norm.weight' is torch.bfloat16 \(4, 4\); expected torch.bfloat16 \(16,\)",
    ),
    "another dtype of the same size": (
        lambda t: iter((t | {"norm.weight": t["norm.weight"].view(torch.float16)}).items()),
        r"'norm.weight' is torch.float16 \(16,\); expected torch.bfloat16",
    ),
}


@pytest.mark.parametrize("old", [False, True], ids=["new destination", "old destination"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_wrong_stream_of_tensors_is_refused_and_changes_nothing(
    tmp_path: Path, tensors: dict[str, Tensor], mistake: str, old: bool
) -> None:
    if old:
        write(tmp_path / "x", {"old": torch.ones(3)})
    make, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        write_checkpoint(tmp_path / "x", make(tensors), specs=specs_of(tensors), max_shard_bytes=200, extra_files={}, replace=True)
    assert os.listdir(tmp_path) == (["x"] if old else [])
    if old:
        with SafetensorsReader(tmp_path / "x") as reader:
            assert reader.names == ("old",)


def test_plan_refuses_what_no_file_can_hold() -> None:
    one = ("a", (2,), torch.float32)
    for specs, limit, message in [
        ([one, one], 9, "'a' is listed twice"),
        ([("__metadata__", (2,), torch.float32)], 9, "reserved"),
        ([("a", (2,), torch.complex64)], 9, "dtype is torch.complex64"),
        ([one], 0, "max_shard_bytes is 0"),
        ([], 9, "no tensors"),
    ]:
        with pytest.raises(ValueError, match=message):
            plan_shards(specs, max_shard_bytes=limit)


@pytest.mark.parametrize("name", ["../x", "a/b", "", INDEX_FILE, "model-00001-of-00004.safetensors"])
def test_extra_file_outside_the_folder_or_over_the_weights_is_refused(tmp_path: Path, tensors: dict[str, Tensor], name: str) -> None:
    with pytest.raises(ValueError, match="extra file"):
        write(tmp_path / "x", tensors, max_shard_bytes=200, extra_files={name: b""})
    assert os.listdir(tmp_path) == []


def test_full_disk_names_file_and_tensor_and_keeps_the_old_checkpoint(
    tmp_path: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "x", {"old": torch.ones(3)})
    headers = sum(file_bytes(specs) for specs in plan_shards(specs_of(tensors), max_shard_bytes=200).values()) - 608
    room, real = headers + 300, os.pwrite  # three tensors fit, the fourth does not

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        nonlocal room
        if room < len(data):
            raise OSError(errno.ENOSPC, "No space left on device")
        room -= len(data)
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OSError, match=r"No space left on device while writing 'layer.3.weight': .*model-00002-of-00004") as error:
        write(tmp_path / "x", tensors, max_shard_bytes=200, replace=True)
    assert error.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == ["x"]
    with SafetensorsReader(tmp_path / "x") as reader:
        assert reader.names == ("old",)


def test_short_reads_and_writes_of_the_system_are_continued(
    tmp_path: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: pwrite(descriptor, data[:7], offset))
    monkeypatch.setattr(os, "preadv", lambda descriptor, buffers, offset: preadv(descriptor, [buffers[0][:5]], offset))
    write(tmp_path / "x", tensors)
    with SafetensorsReader(tmp_path / "x") as reader:
        assert {name: bits(reader.read(name)) for name in tensors} == {name: bits(tensor) for name, tensor in tensors.items()}


def _write_and_stall(directory: Path, tensors: dict[str, Tensor], stall_after: int, ready: Connection) -> None:
    def stream() -> Iterator[tuple[str, Tensor]]:
        for number, item in enumerate(tensors.items()):
            if number == stall_after:
                ready.send(number)
                signal.pause()
            yield item
        ready.send(len(tensors))
        signal.pause()

    write_checkpoint(directory, stream(), specs=specs_of(tensors), max_shard_bytes=200, extra_files={}, replace=True)


@pytest.mark.parametrize("old", [False, True], ids=["new destination", "old destination"])
@pytest.mark.parametrize("stall_after", [0, 3, 7])
def test_writer_killed_midway_leaves_the_destination_absent_or_old(
    tmp_path: Path, tensors: dict[str, Tensor], stall_after: int, old: bool
) -> None:
    if old:
        write(tmp_path / "x", {"old": torch.ones(3)})
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    writer = context.Process(target=_write_and_stall, args=(tmp_path / "x", tensors, stall_after, send))
    writer.start()
    assert receive.poll(60) and receive.recv() == stall_after
    assert writer.pid is not None
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    assert (tmp_path / "x").exists() == old
    if old:
        with SafetensorsReader(tmp_path / "x") as reader:
            assert reader.read("old").tolist() == [1.0] * 3
    write(tmp_path / "x", tensors, replace=old)  # what was left behind is in nobody's way
    with SafetensorsReader(tmp_path / "x") as reader:
        assert set(reader.names) == set(tensors)


# Through the whole table, against transformers


def tiny_model(kind: str) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    shape = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "initializer_range": 0.2,
             "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}}  # fmt: skip
    if kind == "moe":
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **experts, tie_word_embeddings=False))
    return Qwen3ForCausalLM(Qwen3Config(**shape, tie_word_embeddings=kind == "dense_tied"))


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
@pytest.mark.parametrize("kind", ["moe", "dense_tied", "dense_untied"])
def test_transformers_loads_the_round_trip_and_computes_the_same_logits(tmp_path: Path, kind: str, max_shard_bytes: int) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_model(kind).eval()
    model.save_pretrained(tmp_path / "before", max_shard_size=max_shard_bytes)
    config = read_config(tmp_path / "before")
    architecture = Architecture.from_config(config, source="before")
    with SafetensorsReader(tmp_path / "before") as reader:
        check_hf_tensors(architecture, {name: reader.shape(name) for name in reader.names}, source="before")

        def stream() -> Iterator[tuple[str, Tensor]]:
            for parameter in parameters(architecture):
                full = parameter.from_hf([reader.read(name) for name in parameter.hf_names])
                yield from zip(parameter.hf_names, parameter.to_hf(full), strict=True)

        write_checkpoint(
            tmp_path / "after",
            stream(),
            specs=[(name, shape, torch.float32) for name, shape in hf_shapes(architecture).items()],
            max_shard_bytes=max_shard_bytes,
            extra_files={"config.json": json.dumps(config_with_both_spellings(config)).encode()},
        )
    if max_shard_bytes == 10**9:
        assert (tmp_path / "after" / SINGLE_FILE).read_bytes() == (tmp_path / "before" / SINGLE_FILE).read_bytes()
    else:
        assert len(list((tmp_path / "after").glob("model-*.safetensors"))) > 1
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "after", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    token_ids = torch.arange(24).view(2, 12) * 3
    with torch.no_grad():
        assert torch.equal(loaded.eval()(token_ids).logits, model(token_ids).logits)
