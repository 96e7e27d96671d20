"""The torch_dist reader and writer against PyTorch's own distributed checkpoint, which is the format."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from checkpoints_convert import torch_dist_writer
from checkpoints_convert.torch_dist_metadata import FORMAT_FILE, read_metadata
from checkpoints_convert.torch_dist_reader import TorchDistReader
from checkpoints_convert.torch_dist_writer import Part, TorchDistWriter

pytestmark = pytest.mark.filterwarnings("ignore")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def numbers(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def save_with_torch(folder: Path, state: dict[str, Any]) -> None:
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    (folder / FORMAT_FILE).write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')


def parts_of(key: str, stacked: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype, row_parts: int = 1) -> list[Part]:
    indices = torch.cartesian_prod(*(torch.arange(n) for n in stacked)).view(-1, len(stacked)).tolist() if stacked else [[]]
    return [Part(key=key, saved_shape=(*stacked, *shape), dtype=dtype, index=tuple(index), row_parts=row_parts) for index in indices]


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_torch_saved_is_read_whole_and_in_boxes(dtype: torch.dtype, tmp_path: Path) -> None:
    saved = {"a": numbers((3, 4, 5), dtype), "b": numbers((7,), dtype), "c": numbers((6, 2), dtype).t(), "scalar": numbers((), dtype)}
    save_with_torch(tmp_path, {**saved, "optimizer.state.exp_avg.a": numbers((3,)), "no tensor": {"step": 3}})
    with TorchDistReader(tmp_path) as reader:
        assert set(reader.names) == set(saved)
        for key, tensor in saved.items():
            assert torch.equal(reader.read(key), tensor)
            assert (reader.shape(key), reader.dtype(key)) == (tensor.shape, dtype)
        assert torch.equal(reader.read_box("a", (1, 1, 0), (2, 2, 5)), saved["a"][1:, 1:3])
        assert torch.equal(reader.read_box("a", (0, 0, 2), (3, 4, 2)), saved["a"][:, :, 2:4])
        assert torch.equal(reader.read_box("c", (1, 5), (1, 1)), saved["c"][1:, 5:])
    assert "optimizer.state.exp_avg.a" in read_metadata(tmp_path, optimizer=True)


def test_more_files_than_a_process_may_usually_open_are_read(tmp_path: Path) -> None:
    """A run on 512 ranks writes 1,024 files, the usual limit."""
    rows = numbers((40, 3))
    parts = parts_of("rows", (40,), (3,), torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_dist_writer, "_LARGEST_FILE", 1)
        with TorchDistWriter(tmp_path, parts, objects=[], destination=tmp_path) as writer:
            for index, row in enumerate(rows):
                writer.write_rows("rows", (index,), 0, row)
            writer.finish()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        with TorchDistReader(tmp_path) as reader:
            assert len(reader.files) == 40
            assert torch.equal(reader.read("rows"), rows)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_loads_what_was_written_in_any_order(dtype: torch.dtype, tmp_path: Path) -> None:
    experts, plain = numbers((2, 3, 4, 5), dtype), numbers((6,), dtype)
    parts = [*parts_of("experts", (2, 3), (4, 5), dtype, row_parts=2), *parts_of("plain", (), (6,), dtype)]
    with TorchDistWriter(tmp_path, parts, objects=["state/shard_0_1"], destination=tmp_path) as writer:
        writer.write_rows("plain", (), 4, plain[4:])
        for layer in (1, 0):
            for expert in (2, 0, 1):
                writer.write_rows("experts", (layer, expert), 3, experts[layer, expert, 3:])
                writer.write_rows("experts", (layer, expert), 0, experts[layer, expert, :3])
        writer.write_rows("plain", (), 0, plain[:4])
        writer.finish()
    found: dict[str, Any] = {"experts": torch.zeros_like(experts), "plain": torch.zeros_like(plain), "state/shard_0_1": None}
    dcp.load(found, checkpoint_id=tmp_path, no_dist=True)
    assert torch.equal(found["experts"], experts)
    assert torch.equal(found["plain"], plain)
    with TorchDistReader(tmp_path) as reader:
        assert torch.equal(reader.read("experts"), experts)
        assert torch.equal(reader.read_box("experts", (0, 1, 1, 0), (2, 2, 2, 5)), experts[:, 1:, 1:3])


def test_a_large_tensor_is_cut_into_chunks_and_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("checkpoints_convert.torch_dist_writer._LARGEST_CHUNK", 200)
    monkeypatch.setattr("checkpoints_convert.torch_dist_writer._LARGEST_FILE", 5000)
    rows = numbers((33, 10))
    with TorchDistWriter(tmp_path, parts_of("w", (), (33, 10), torch.float32), objects=(), destination=tmp_path) as writer:
        writer.write_rows("w", (), 0, rows)
        writer.finish()
    metadata = read_metadata(tmp_path)["w"]
    assert [chunk.shape[0] for chunk in metadata.chunks] == [5] * 6 + [3]
    files = list(tmp_path.glob("*.distcp"))
    assert len(files) > 1
    assert all(path.stat().st_size <= 5000 for path in files)
    found = {"w": torch.zeros(33, 10)}
    dcp.load(found, checkpoint_id=tmp_path, no_dist=True)
    assert torch.equal(found["w"], rows)


def test_a_record_that_is_no_plain_tensor_is_left_to_torch(tmp_path: Path) -> None:
    """A record may hold a view of a larger storage; its bytes are then not those of the tensor."""
    saved = {"w": numbers((4, 6))}
    save_with_torch(tmp_path, saved)
    (chunk,) = read_metadata(tmp_path)["w"].chunks
    path = tmp_path / chunk.file_name
    content = path.read_bytes()
    torch.save(numbers((6, 4)).t(), tmp_path / "view.pt")
    view = (tmp_path / "view.pt").read_bytes()
    assert len(view) <= chunk.length + 64  # of about the same size: only the strides differ
    import io

    with TorchDistReader(tmp_path) as reader:
        before = reader.read("w")
    path.write_bytes(view.ljust(len(content), b"\0") if len(view) <= len(content) else view)
    metadata_length = len(view)
    import pickle

    with (tmp_path / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    for info in metadata.storage_data.values():
        info.length = metadata_length
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with TorchDistReader(tmp_path) as reader:
        assert torch.equal(reader.read("w"), torch.load(io.BytesIO(view), weights_only=True))
    assert torch.equal(before, saved["w"])


def test_rows_that_were_never_given_are_named(tmp_path: Path) -> None:
    with TorchDistWriter(tmp_path, parts_of("w", (2,), (4,), torch.float32), objects=(), destination=tmp_path) as writer:
        writer.write_rows("w", (0,), 0, numbers((4,)))
        writer.write_rows("w", (1,), 0, numbers((3,)))
        with pytest.raises(ValueError, match=r"1 rows of 'w' \(1,\) too few"):
            writer.finish()


@pytest.mark.parametrize(
    ("index", "first", "rows", "message"),
    [
        ((2,), 0, torch.zeros(4), "is not part of this checkpoint"),
        ((0,), 1, torch.zeros(4), "rows 1 to 5"),
        ((0,), 0, torch.zeros(4, 1), "expected torch.float32 and rows of"),
        ((0,), 0, torch.zeros(4, dtype=torch.bfloat16), "bfloat16"),
    ],
)
def test_rows_that_do_not_fit_are_refused(index: tuple[int, ...], first: int, rows: Tensor, message: str, tmp_path: Path) -> None:
    with (
        TorchDistWriter(tmp_path, parts_of("w", (2,), (4,), torch.float32), objects=(), destination=tmp_path) as writer,
        pytest.raises(ValueError, match=message),
    ):
        writer.write_rows("w", index, first, rows)
