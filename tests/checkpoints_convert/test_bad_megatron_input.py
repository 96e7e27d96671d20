"""`minpro convert` given a damaged or hostile Megatron checkpoint, or two that differ: one line that names it, and nothing is written."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from checkpoints_convert.hf_config import Architecture
from checkpoints_convert.mapping import hf_shapes
from checkpoints_convert.safetensors_io import write_checkpoint
from megatron_minpro import cli

CONFIG: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
FC1, HEAD, NORM = "decoder.layers.mlp.linear_fc1.weight", "output_layer.weight", "decoder.final_layernorm.weight"
Spoil = Callable[[Path], object]


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A dense Qwen3 folder with random weights, and the Megatron checkpoint made of it."""
    folder = tmp_path_factory.mktemp("pair")
    generator = torch.Generator().manual_seed(0)
    shapes = hf_shapes(Architecture.from_config(CONFIG, source="test"))
    write_checkpoint(
        folder / "model",
        ((name, torch.randn(shape, generator=generator).bfloat16()) for name, shape in shapes.items()),
        specs=[(name, shape, torch.bfloat16) for name, shape in shapes.items()],
        max_shard_bytes=10**9,
        extra_files={"config.json": json.dumps(CONFIG).encode()},
    )
    assert cli.run(["convert", "hf-to-megatron", str(folder / "model"), str(folder / "checkpoint")]) == 0
    return folder / "model", folder / "checkpoint"


@pytest.fixture
def source(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the Megatron checkpoint to spoil; without the manifest, whose hashes would notice everything."""
    folder = Path(shutil.copytree(pair[1], tmp_path / "checkpoint"))
    (folder / "minpro_manifest.json").unlink()
    return folder


def metadata(folder: Path) -> Any:
    return pickle.loads((folder / ".metadata").read_bytes())


def edit_metadata(change: Callable[[Any], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        content = metadata(folder)
        change(content)
        (folder / ".metadata").write_bytes(pickle.dumps(content))

    return spoil


def edit_storage(key: str, change: Callable[[Any], object]) -> Spoil:
    """Change where the first chunk of a tensor is said to lie."""
    return edit_metadata(lambda m: change(next(info for index, info in m.storage_data.items() if index.fqn == key)))


def edit_entry(key: str, change: Callable[[Any], object]) -> Spoil:
    return edit_metadata(lambda m: change(m.state_dict_metadata[key]))


def forget(key: str) -> Spoil:
    return edit_metadata(lambda m: m.state_dict_metadata.pop(key))


def move_chunk(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Spoil:
    """Give the first chunk of FC1 another box; its record follows."""

    def change(content: Any) -> None:
        entry = content.state_dict_metadata[FC1]
        old = MetadataIndex(FC1, entry.chunks[0].offsets)
        content.storage_data[MetadataIndex(FC1, torch.Size(offsets))] = content.storage_data[old]
        entry.chunks[0] = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))

    return edit_metadata(change)


def negative_box(content: Any) -> None:
    entry = content.state_dict_metadata[NORM]
    content.storage_data[MetadataIndex(NORM, (-1,))] = next(iter(content.storage_data.values()))
    entry.chunks[0] = ChunkStorageMetadata((-1,), (33,))  # type: ignore[arg-type]


def add_tensor(content: Any) -> None:
    norm = content.state_dict_metadata[NORM]
    content.state_dict_metadata["decoder.surprise"] = TensorStorageMetadata(norm.properties, norm.size, norm.chunks)
    content.storage_data[MetadataIndex("decoder.surprise", torch.Size([0]))] = content.storage_data[MetadataIndex(NORM, torch.Size([0]))]


def replace_record(key: str, value: Any) -> Spoil:
    """Put another object where the metadata says a tensor is, behind everything else."""

    def spoil(folder: Path) -> None:
        content = metadata(folder)
        info = next(info for index, info in content.storage_data.items() if index.fqn == key)
        path = folder / info.relative_path
        info.offset = path.stat().st_size
        with path.open("ab") as file:
            torch.save(value, file) if not isinstance(value, bytes) else file.write(value)
        info.length = path.stat().st_size - info.offset
        (folder / ".metadata").write_bytes(pickle.dumps(content))

    return spoil


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


def pickled_call(module: str, name: str) -> bytes:
    """The call module.name("touch owned") as protocol 4 spells it: dots in the name reach through what the module imports."""
    text = [f"\x8c{chr(len(part))}{part}".encode("latin-1") for part in (module, name, "touch owned")]
    return b"\x80\x04" + text[0] + text[1] + b"\x93" + text[2] + b"\x85R."


def put_metadata(content: bytes) -> Spoil:
    return lambda folder: (folder / ".metadata").write_bytes(content)


def data_file(folder: Path) -> Path:
    return sorted(folder.glob("*.distcp"))[0]


def truncate(path: Path, size: int) -> None:
    with path.open("rb+") as file:
        file.truncate(path.stat().st_size + size if size < 0 else size)


def as_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def edit_config(**values: Any) -> Spoil:
    return lambda folder: (folder / "config.json").write_text(json.dumps(CONFIG | values))


META = ".metadata: "
SPOILED: dict[str, tuple[Spoil, tuple[str, ...]]] = {
    "metadata missing": (lambda f: (f / ".metadata").unlink(), ("checkpoint",)),
    "metadata empty": (put_metadata(b""), (META,)),
    "metadata cut": (lambda f: truncate(f / ".metadata", -50), (META,)),
    "metadata of text": (put_metadata(b"hello"), (META,)),
    "metadata of another object": (put_metadata(pickle.dumps({"a": 1})), (META,)),
    "metadata claims a string of 4 GB": (put_metadata(b"\x80\x04\x8d" + (2**32).to_bytes(8, "little")), (META,)),
    "metadata is a FIFO": (lambda f: as_fifo(f / ".metadata"), ("checkpoint",)),
    "pickle calls os.system": (put_metadata(pickle.dumps(Call(os.system, "touch owned"))), (META, "system")),
    "pickle calls eval": (put_metadata(pickle.dumps(Call(eval, "open('owned', 'w')"))), (META, "eval")),
    "pickle calls open": (put_metadata(pickle.dumps(Call(open, "owned", "w"))), (META, "open")),
    "pickle calls getattr": (put_metadata(pickle.dumps(Call(getattr, dict, "fromkeys"))), (META, "fromkeys")),
    "pickle reaches through a dotted name": (
        put_metadata(pickled_call("torch.distributed.checkpoint.filesystem", "os.system")),
        (META, "os.system"),
    ),
    "pickle reaches through a listed class": (put_metadata(pickled_call("pathlib", "Path.touch")), (META, "Path.touch")),
    "pickle names torch.load": (put_metadata(pickled_call("torch", "load")), (META, "torch.load")),
    "pickle names a module of ours": (put_metadata(pickled_call("checkpoints_convert.convert", "shutil.rmtree")), (META, "rmtree")),
    "persistent id": (put_metadata(b"\x80\x04\x8c\x01xQ."), (META,)),
    "format file missing": (lambda f: (f / "metadata.json").unlink(), ("metadata.json",)),
    "format file of another backend": (
        lambda f: (f / "metadata.json").write_text('{"sharded_backend": "zarr"}'),
        ("metadata.json", "zarr", "torch_dist"),
    ),
    "format file is not JSON": (lambda f: (f / "metadata.json").write_text("zarr"), ("metadata.json",)),
    "format file of brackets 100,000 deep": (lambda f: (f / "metadata.json").write_text("[" * 100_000), ("metadata.json",)),
    "data file missing": (lambda f: data_file(f).unlink(), (".distcp: ", "absent")),
    "data file cut": (lambda f: truncate(data_file(f), 5000), (".distcp: ", "truncated")),
    "data file empty": (lambda f: truncate(data_file(f), 0), (".distcp: ", "truncated")),
    "data file is a folder": (lambda f: (data_file(f).rename(f / "x"), (f / "__0_0.distcp").mkdir()), (".distcp: ", "absent")),
    "offset behind the end": (edit_storage(NORM, lambda i: setattr(i, "offset", 10**9)), (".distcp: ", NORM)),
    "offset negative": (edit_storage(NORM, lambda i: setattr(i, "offset", -1)), (META, NORM)),
    "offset of text": (edit_storage(NORM, lambda i: setattr(i, "offset", "0")), (META, NORM)),
    "offset of another record": (edit_storage(NORM, lambda i: setattr(i, "offset", 0)), (".distcp: ", NORM)),
    "offset inside a record": (edit_storage(NORM, lambda i: setattr(i, "offset", i.offset + 8)), (".distcp: ", NORM)),
    "length zero": (edit_storage(NORM, lambda i: setattr(i, "length", 0)), (".distcp: ", NORM)),
    "length too short": (edit_storage(NORM, lambda i: setattr(i, "length", i.length - 30)), (".distcp: ", NORM)),
    "data file outside the folder": (edit_storage(NORM, lambda i: setattr(i, "relative_path", "../x.distcp")), (META, NORM, "../x.distcp")),
    "data file by absolute path": (edit_storage(NORM, lambda i: setattr(i, "relative_path", "/etc/passwd")), (META, NORM, "/etc/passwd")),
    "record is compressed": (edit_storage(NORM, lambda i: setattr(i, "transform_descriptors", ["zstd"])), (META, NORM, "zstd")),
    "chunk without a place": (
        edit_metadata(lambda m: m.storage_data.pop(next(i for i in m.storage_data if i.fqn == NORM))),
        (META, NORM, "no place"),
    ),
    "chunks overlap": (move_chunk((1, 0, 0), (1, 48, 32)), (META, FC1, "overlaps")),
    "chunk outside": (move_chunk((0, 90, 0), (1, 48, 32)), (META, FC1, "outside")),
    "chunk too small": (move_chunk((0, 0, 0), (1, 47, 32)), (META, FC1)),
    "chunk of no size": (move_chunk((0, 0, 0), (0, 48, 32)), (META, FC1)),
    "chunk of fewer axes": (move_chunk((0, 0), (48, 32)), (META, FC1, "axes")),
    "chunk at a negative place": (edit_metadata(negative_box), (META, NORM)),
    "tensor without chunks": (edit_entry(NORM, lambda e: e.chunks.clear()), (META, NORM)),
    "tensor of 10^18 elements": (edit_entry(NORM, lambda e: setattr(e, "size", torch.Size([10**18]))), (META, NORM)),
    "tensor of an unknown dtype": (edit_entry(NORM, lambda e: setattr(e.properties, "dtype", "bf16")), (META, NORM, "bf16")),
    "tensor of integers": (
        edit_entry(NORM, lambda e: setattr(e.properties, "dtype", torch.int16)),
        ("checkpoint: ", "model.norm.weight", "int16"),
    ),
    "tensor missing": (forget(FC1), ("checkpoint: ", FC1)),
    "tensor that is an object": (
        edit_metadata(lambda m: m.state_dict_metadata.update({FC1: BytesStorageMetadata()})),
        ("checkpoint: ", FC1),
    ),
    "embedding missing": (forget("embedding.word_embeddings.weight"), ("checkpoint: ", "embedding.word_embeddings.weight")),
    "tensor too many": (edit_metadata(add_tensor), ("checkpoint: ", "decoder.surprise")),
    "record is another tensor": (replace_record(NORM, torch.zeros(33, dtype=torch.bfloat16)), (".distcp: ", NORM, "(33,)")),
    "record is of another dtype": (replace_record(NORM, torch.zeros(32)), (".distcp: ", NORM, "float32")),
    "record is an object": (replace_record(NORM, {"a": 1}), (".distcp: ", NORM, "dict")),
    "record is noise": (replace_record(NORM, bytes(range(256)) * 8), (".distcp: ", NORM, "damaged")),
    "record calls os.system": (replace_record(NORM, Call(os.system, "touch owned")), (".distcp: ", NORM)),
    "config.json missing": (lambda f: (f / "config.json").unlink(), ("config.json",)),
    "config.json of a wider model": (edit_config(hidden_size=64), ("checkpoint: ", "(96, 32)", "(96, 64)")),
    "config.json with more layers": (edit_config(num_hidden_layers=3), ("checkpoint: ",)),
    "config.json with fewer layers": (edit_config(num_hidden_layers=1), ("checkpoint: ",)),
    "config.json with a larger vocabulary": (edit_config(vocab_size=97), ("checkpoint: ", "97")),
    "config.json tied": (edit_config(tie_word_embeddings=True), ("checkpoint: ", HEAD)),
    "config.json of experts": (
        edit_config(model_type="qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, norm_topk_prob=True),
        ("checkpoint: ", "mlp.router.weight"),
    ),
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("case", SPOILED)
def test_spoiled_megatron_checkpoint_is_refused(
    case: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check_refused: Callable[..., None]
) -> None:
    monkeypatch.chdir(tmp_path)  # where a pickle that ran would leave its mark
    spoil, needles = SPOILED[case]
    spoil(source)
    check_refused(["megatron-to-hf", str(source), str(tmp_path / "out")], needles)
    assert os.listdir(tmp_path) == ["checkpoint"]


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def flip_in_tensor(folder: Path, key: str) -> None:
    info = next(info for index, info in metadata(folder).storage_data.items() if index.fqn == key)
    flip(folder / info.relative_path, info.offset + info.length // 2)


def test_one_flipped_bit_is_noticed_by_the_manifest(pair: tuple[Path, Path], tmp_path: Path, check_refused: Callable[..., None]) -> None:
    source = Path(shutil.copytree(pair[1], tmp_path / "checkpoint"))
    flip_in_tensor(source, HEAD)
    check_refused(["megatron-to-hf", str(source), str(tmp_path / "out")], (str(source), "lm_head.weight"))
    assert os.listdir(tmp_path) == ["checkpoint"]


@pytest.mark.parametrize(
    "change, needles",
    [
        (lambda text: text[:100], ()),
        (lambda text: "[]", ()),
        (lambda text: text.replace('"version": 1', '"version": 2'), ("version 2",)),
        (lambda text: text.replace('"xxh3_128": "', '"xxh3_128": "0', 1), ("XXH3 hash",)),
        (lambda text: text.replace("model.safetensors", "../model.safetensors"), ("../model.safetensors",)),
        (lambda text: text.replace("BF16", "BF17"), ("BF17",)),
        (lambda text: text.replace("lm_head", "lm_tail"), ("lm_head.weight",)),
    ],
)
def test_damaged_manifest_is_named(
    change: Callable[[str], str], needles: tuple[str, ...], pair: tuple[Path, Path], tmp_path: Path, check_refused: Callable[..., None]
) -> None:
    source = Path(shutil.copytree(pair[1], tmp_path / "checkpoint"))
    manifest = source / "minpro_manifest.json"
    manifest.write_text(change(manifest.read_text()))
    check_refused(["megatron-to-hf", str(source), str(tmp_path / "out")], ("minpro_manifest.json", *needles))
    assert os.listdir(tmp_path) == ["checkpoint"]


@pytest.mark.timeout(120)
def test_every_single_flipped_bit_of_the_data_is_noticed_or_harmless(pair: tuple[Path, Path], tmp_path: Path) -> None:
    original = load_file(pair[0] / "model.safetensors")
    source = Path(shutil.copytree(pair[1], tmp_path / "checkpoint"))
    path = data_file(source)
    content = path.read_bytes()
    generator = torch.Generator().manual_seed(3)
    refused = 0
    for _ in range(100):
        position, bit = (int(torch.randint(high, (), generator=generator)) for high in (len(content), 8))
        path.write_bytes(content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :])
        code = cli.run(["convert", "megatron-to-hf", str(source), str(tmp_path / "out"), "--force", "--json"])
        assert code in (0, 2)
        refused += code == 2
        if code == 0:  # in a record's frame, or its padding
            found = load_file(tmp_path / "out" / "model.safetensors")
            assert found.keys() == original.keys() and all(torch.equal(found[name], tensor) for name, tensor in original.items())
    assert refused > 40


def flip_safetensors(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"].view(torch.uint8)[7, 9] ^= 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def drop_safetensors(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "spoil, needle",
    [(flip_safetensors, "model.layers.1.mlp.up_proj.weight"), (drop_safetensors, "model.norm.weight")],
)
def test_verify_names_the_first_difference(spoil: Spoil, needle: str, pair: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
    other = Path(shutil.copytree(pair[0], tmp_path / "other"))
    spoil(other)
    for first, second in ((other, pair[1]), (pair[1], other), (other, pair[0])):
        capsys.readouterr()
        assert cli.run(["convert", "verify", str(first), str(second)]) in (1, 2)
        error = capsys.readouterr().err
        assert needle in error and len(error.splitlines()) == 1


def test_verify_reads_the_bytes_and_not_the_manifests(pair: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
    other = Path(shutil.copytree(pair[1], tmp_path / "other"))
    flip_in_tensor(other, HEAD)
    assert cli.run(["convert", "verify", str(pair[1]), str(other)]) in (1, 2)
    assert "lm_head.weight" in capsys.readouterr().err


@pytest.mark.timeout(120)
def test_every_single_flipped_bit_of_the_metadata_is_refused_or_harmless(source: Path, pair: tuple[Path, Path], tmp_path: Path) -> None:
    # Whatever is still accepted must be the same weights, bit for bit.
    original = load_file(pair[0] / "model.safetensors")
    content = (source / ".metadata").read_bytes()
    generator = torch.Generator().manual_seed(2)
    refused = 0
    for _ in range(150):
        position, bit = (int(torch.randint(high, (), generator=generator)) for high in (len(content), 8))
        (source / ".metadata").write_bytes(content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :])
        code = cli.run(["convert", "megatron-to-hf", str(source), str(tmp_path / "out"), "--force"])
        assert code in (0, 2)
        refused += code == 2
        if code == 0:
            found = load_file(tmp_path / "out" / "model.safetensors")
            assert found.keys() == original.keys() and all(torch.equal(found[name], tensor) for name, tensor in original.items())
    assert refused > 20
