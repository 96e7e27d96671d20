"""A checkpoint's metadata is a pickle: it may name what checkpoints are made of, and nothing else."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from checkpoints_convert.checkpoint_pickle import check_metadata


class RunsACommand:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("echo should never run",)


class TakesAnAttribute:
    def __reduce__(self) -> tuple[object, tuple[object, str]]:
        return getattr, (torch.Size, "count")


@pytest.mark.filterwarnings("ignore")
def test_metadata_written_by_torch_is_accepted(tmp_path: Path) -> None:
    dcp.save({"weight": torch.zeros(2, 3), "half": torch.zeros(4, dtype=torch.bfloat16), "step": 7}, checkpoint_id=tmp_path, no_dist=True)
    check_metadata(tmp_path / ".metadata")


@pytest.mark.parametrize("content", [RunsACommand(), TakesAnAttribute(), [RunsACommand()]], ids=["command", "attribute", "nested"])
def test_a_pickle_that_imports_anything_else_is_refused_by_name(content: object, tmp_path: Path) -> None:
    path = tmp_path / ".metadata"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=r"\.metadata: not the metadata of a checkpoint \(.*which no checkpoint needs\)"):
        check_metadata(path)


def test_a_dotted_name_does_not_reach_what_a_listed_module_imports(tmp_path: Path) -> None:
    module, name, argument = b"torch.distributed.checkpoint.metadata", b"os.system", b"echo should never run"
    payload = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(text)]) + text for text in (module, name)) + b"\x93"
    payload += b"\x8c" + bytes([len(argument)]) + argument + b"\x85R."
    path = tmp_path / ".metadata"
    path.write_bytes(payload)
    with pytest.raises(ValueError, match=r"refers to torch\.distributed\.checkpoint\.metadata\.os\.system"):
        check_metadata(path)


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"not a pickle at all"], ids=["empty", "cut short", "text"])
def test_damaged_metadata_is_one_error_that_names_the_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / ".metadata"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not the metadata of a checkpoint"):
        check_metadata(path)


def test_missing_metadata_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere.*\.metadata"):
        check_metadata(tmp_path / "nowhere" / ".metadata")
