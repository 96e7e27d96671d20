"""`minpro convert` given a Hugging Face folder or a destination that is wrong: one line that names it, and nothing is written."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints_convert.safetensors_io import INDEX_FILE, SafetensorsReader

REPOSITORY = Path(__file__).resolve().parents[2]
ROUTER = "model.layers.1.mlp.gate.weight"
Spoil = Callable[[Path], object]


@pytest.fixture
def source(good: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(good, tmp_path / "model"))


def first_file(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def file_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX_FILE).read_text())["weight_map"][name]


def edit_header(change: Callable[[dict[str, Any]], object]) -> Spoil:
    """Rewrite the JSON header of the router's file and keep its bytes."""

    def spoil(folder: Path) -> None:
        path = file_of(folder, ROUTER)
        content = path.read_bytes()
        (length,) = struct.unpack_from("<Q", content)
        header = json.loads(content[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return spoil


def put_header(text: bytes, claimed: int | None = None) -> Spoil:
    return lambda folder: file_of(folder, ROUTER).write_bytes(struct.pack("<Q", len(text) if claimed is None else claimed) + text)


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    """Save the router's file anew, with other tensors; the index follows."""

    def spoil(folder: Path) -> None:
        path = file_of(folder, ROUTER)
        tensors = load_file(path)
        before = set(tensors)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})
        index = json.loads((folder / INDEX_FILE).read_text())
        index["weight_map"] = {k: v for k, v in index["weight_map"].items() if k not in before} | dict.fromkeys(tensors, path.name)
        (folder / INDEX_FILE).write_text(json.dumps(index))

    return spoil


def edit_json(name: str, change: Callable[[dict[str, Any]], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return spoil


def edit_config(**values: Any) -> Spoil:
    return edit_json("config.json", lambda config: config.update(values))


def place(name: str, file_name: object) -> Spoil:
    return edit_json(INDEX_FILE, lambda index: index["weight_map"].__setitem__(name, file_name))


def truncate(path: Path, size: int) -> None:
    with path.open("rb+") as file:
        file.truncate(path.stat().st_size + size if size < 0 else size)


def as_fifo(folder: Path) -> None:
    path = first_file(folder)
    path.unlink()
    os.mkfifo(path)


FILE = ".safetensors: "
SPOILED: dict[str, tuple[Spoil, tuple[str, ...]]] = {
    "file ends inside its tensors": (lambda f: truncate(file_of(f, ROUTER), -10), (FILE, "truncated")),
    "file ends inside its header": (lambda f: truncate(file_of(f, ROUTER), 40), (FILE, "announces a header")),
    "file is empty": (lambda f: truncate(file_of(f, ROUTER), 0), (FILE, "0 bytes long")),
    "bytes behind the last tensor": (lambda f: file_of(f, ROUTER).open("ab").write(b"more"), (FILE, "followed by other bytes")),
    "header of 10 GB": (put_header(b"{}", 10 * 2**30), (FILE, "10737418240")),
    "header of 2^64 - 1 bytes": (put_header(b"{}", 2**64 - 1), (FILE, "18446744073709551615")),
    "header of text": (put_header(b"not json"), (FILE, "not valid JSON")),
    "header of a list": (put_header(b"[1]"), (FILE, "list")),
    "header of brackets 100,000 deep": (put_header(b"[" * 100_000), (FILE, "not valid JSON")),
    "header with a number of 5,000 digits": (put_header(b'{"x": ' + b"1" * 5000 + b"}"), (FILE,)),
    "header that is not UTF-8": (put_header(b'{"\xff\xfe": 1}'), (FILE, "not valid JSON")),
    "header with a name twice": (put_header(b'{"x": 1, "x": 2}'), (FILE, "'x' appears twice")),
    "offsets of NaN": (edit_header(lambda h: h[ROUTER].update(data_offsets=[float("nan"), 1])), (FILE, ROUTER, "malformed")),
    "negative shape": (edit_header(lambda h: h[ROUTER].update(shape=[-4, -32])), (FILE, ROUTER, "malformed")),
    "shape of text": (edit_header(lambda h: h[ROUTER].update(shape="4x32")), (FILE, ROUTER, "malformed")),
    "shape of booleans": (edit_header(lambda h: h[ROUTER].update(shape=[True, 128])), (FILE, ROUTER, "malformed")),
    "entry without offsets": (edit_header(lambda h: h[ROUTER].pop("data_offsets")), (FILE, ROUTER, "malformed")),
    "unknown dtype": (edit_header(lambda h: h[ROUTER].update(dtype="F4")), (FILE, ROUTER, "dtype is 'F4'")),
    "dtype of a list": (edit_header(lambda h: h[ROUTER].update(dtype=["BF16"])), (FILE, ROUTER)),
    "tensors overlap": (edit_header(lambda h: h[ROUTER].update(data_offsets=[0, 256])), (FILE, "lies at bytes")),
    "shape of 10^30": (edit_header(lambda h: h[ROUTER].update(shape=[10**30])), (FILE, ROUTER)),
    "tensor missing": (edit_tensors(lambda t: t.pop(ROUTER)), ("model: ", ROUTER, "missing 1")),
    "tensor too many": (
        edit_tensors(lambda t: t.update({"model.layers.7.x": torch.ones(1)})),
        ("model: ", "model.layers.7.x", "not known 1"),
    ),
    "tensor misspelt": (edit_tensors(lambda t: t.update({ROUTER + "s": t.pop(ROUTER)})), (ROUTER, "may be called")),
    "tensor transposed": (edit_tensors(lambda t: t.update({ROUTER: t[ROUTER].T.contiguous()})), (ROUTER, "(32, 4)", "(4, 32)")),
    "tensor of integers": (edit_tensors(lambda t: t.update({ROUTER: t[ROUTER].to(torch.int32)})), (ROUTER, "int32")),
    "key projection of another dtype": (
        lambda f: edit_dtype(f, "model.layers.0.self_attn.k_proj.weight"),
        ("model.layers.0.self_attn.k_proj.weight", "float32"),
    ),
    "index names an absent file": (place(ROUTER, "model-9.safetensors"), (INDEX_FILE, "model-9.safetensors", "absent")),
    "index climbs out of the folder": (place(ROUTER, "../x.safetensors"), (INDEX_FILE, ROUTER, "../x.safetensors")),
    "index names an absolute path": (place(ROUTER, "/tmp/x.safetensors"), (INDEX_FILE, ROUTER, "/tmp/x.safetensors")),
    "index names a number": (place(ROUTER, 7), (INDEX_FILE, ROUTER, "7")),
    "index names a file with a NUL": (place(ROUTER, "a\0b.safetensors"), (INDEX_FILE,)),
    "index forgets a tensor": (edit_json(INDEX_FILE, lambda i: i["weight_map"].pop(ROUTER)), (FILE, ROUTER, "expected the index")),
    "index places a tensor elsewhere": (lambda f: place(ROUTER, first_file(f).name)(f), (FILE, ROUTER, "expected the index")),
    "index without weight_map": (edit_json(INDEX_FILE, lambda i: i.pop("weight_map")), (INDEX_FILE, "weight_map is missing")),
    "index is not JSON": (lambda f: (f / INDEX_FILE).write_text("{"), (INDEX_FILE, "not valid JSON")),
    "index is a folder": (lambda f: ((f / INDEX_FILE).unlink(), (f / INDEX_FILE).mkdir()), (INDEX_FILE,)),
    "both kinds of weights": (lambda f: shutil.copy(first_file(f), f / "model.safetensors"), ("model: ", "holds both")),
    "no weights": (lambda f: (f / INDEX_FILE).unlink(), ("model: ", "holds neither")),
    "weights file is a FIFO": (as_fifo, (INDEX_FILE, "absent")),
    "single weights file is a FIFO": (lambda f: ((f / INDEX_FILE).unlink(), os.mkfifo(f / "model.safetensors")), ("model.safetensors",)),
    "config.json missing": (lambda f: (f / "config.json").unlink(), ("config.json", "no such file")),
    "config.json is not JSON": (lambda f: (f / "config.json").write_text("model: qwen"), ("config.json", "not valid JSON")),
    "config.json is not text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), ("config.json", "not valid JSON")),
    "config.json of brackets 100,000 deep": (lambda f: (f / "config.json").write_text("[" * 100_000), ("config.json", "not valid JSON")),
    "config.json is a list": (lambda f: (f / "config.json").write_text("[]"), ("config.json", "list")),
    "another family": (edit_config(model_type="llama"), ("config.json", "model_type is 'llama'")),
    "hidden_size disagrees": (edit_config(hidden_size=64), ("model: ", "shape of", "expected")),
    "hidden_size is text": (edit_config(hidden_size="32"), ("config.json", "hidden_size is '32'")),
    "hidden_size is missing": (edit_json("config.json", lambda c: c.pop("hidden_size")), ("config.json", "hidden_size is missing")),
    "one layer too many": (edit_config(num_hidden_layers=3), ("model: ", "missing 21", "model.layers.2.")),
    "one layer too few": (edit_config(num_hidden_layers=1), ("model: ", "not known 21", "model.layers.1.")),
    "vocabulary disagrees": (edit_config(vocab_size=100), ("model: ", "model.embed_tokens.weight", "(96, 32)", "(100, 32)")),
    "experts in two spellings": (edit_config(num_local_experts=8), ("config.json", "num_local_experts is 8")),
    "heads that groups do not divide": (edit_config(num_key_value_heads=3), ("config.json", "num_key_value_heads is 3")),
    "scaled rotary embedding": (edit_config(rope_scaling={"rope_type": "yarn", "factor": 4.0}), ("config.json", "rope_scaling")),
    "rope_theta of NaN": (edit_config(rope_theta=float("nan")), ("config.json", "rope_theta")),
    "quantized already": (edit_config(quantization_config={"quant_method": "fp8"}), ("config.json", "quantization_config")),
    "shared experts": (edit_config(shared_expert_intermediate_size=64), ("config.json", "shared_expert_intermediate_size is 64")),
    "layers of several kinds": (edit_config(mlp_only_layers=[0]), ("config.json", "mlp_only_layers is [0]")),
    "a classifier": (
        edit_config(architectures=["Qwen3MoeForSequenceClassification"]),
        ("config.json", "architectures is ['Qwen3MoeForSequenceClassification']", "expected ['Qwen3MoeForCausalLM']"),
    ),
    "an encoder": (edit_config(architectures=["Qwen3MoeModel"]), ("config.json", "architectures is ['Qwen3MoeModel']")),
    "an adapter beside the weights": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(b"x"),
        ("adapter_model.safetensors: an adapter", "merge the adapter"),
    ),
    "an adapter's settings alone": (lambda f: (f / "adapter_config.json").write_text("{}"), ("adapter_config.json: an adapter",)),
    "one expert per token, renormalised": (edit_config(num_experts_per_tok=1), ("config.json", "num_experts_per_tok is 1", "at least 2")),
    "tokenizer settings cut off": (lambda f: (f / "tokenizer_config.json").write_text("{"), ("tokenizer_config.json", "not valid JSON")),
    "tied, with a head of its own": (edit_config(tie_word_embeddings=True), ("lm_head.weight", "model.embed_tokens.weight")),
}


def edit_dtype(folder: Path, name: str) -> None:
    path = file_of(folder, name)
    tensors = load_file(path)
    save_file({**tensors, name: tensors[name].float()}, path, metadata={"format": "pt"})


@pytest.mark.timeout(30)
@pytest.mark.parametrize("case", SPOILED)
def test_spoiled_hugging_face_folder_is_refused(case: str, source: Path, tmp_path: Path, check_refused: Callable[..., None]) -> None:
    spoil, needles = SPOILED[case]
    spoil(source)
    check_refused(["hf-to-megatron", str(source), str(tmp_path / "out")], needles)
    assert os.listdir(tmp_path) == ["model"]


def test_every_single_flipped_header_byte_is_refused_or_harmless(good: Path, tmp_path: Path) -> None:
    # The reader is called in place of the command, 400 times; whatever it accepts must still be the checkpoint's names and shapes.
    with SafetensorsReader(good) as reader:
        expected = {name: reader.spec(name) for name in reader.names}
    source = Path(shutil.copytree(good, tmp_path / "model"))
    path = file_of(source, ROUTER)
    content = path.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    generator = torch.Generator().manual_seed(1)
    refused = 0
    for _ in range(400):
        position, bit = (int(torch.randint(high, (), generator=generator)) for high in (8 + length, 8))
        path.write_bytes(content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :])
        try:
            with SafetensorsReader(source) as reader:
                found = {name: reader.spec(name) for name in reader.names}
        except ValueError as error:
            assert str(source) in str(error)
            refused += 1
            continue
        assert found == expected  # __metadata__ alone, or white space
    assert refused > 350
