"""A server that serves another folder, or other weights under the same path, is found out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rollout.sglang.server import ServerSettings
from rollout.weights.checksums import ChecksumMismatch, tensor_checksum
from rollout.weights.loaded import check_loaded

O_PROJ = "model.layers.0.self_attn.o_proj.weight"


@contextmanager
def answering(answers: dict[str, Any]) -> Iterator[str]:
    """A process border: answers as a server's control endpoints do."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = json.dumps(answers[self.path]).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.do_GET()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    weights = {
        O_PROJ: torch.randn(4, 4),
        "model.norm.weight": torch.ones(4),
        "model.layers.0.mlp.experts.0.up_proj.weight": torch.ones(2, 4),
    }
    save_file(weights, tmp_path / "model.safetensors")
    return tmp_path


def held(folder: Path, **changed: torch.Tensor) -> dict[str, Any]:
    from safetensors.torch import load_file

    weights = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()} | changed
    checksums = {name: tensor_checksum(tensor) for name, tensor in weights.items()}
    return {"/model_info": {"model_path": str(folder)}, "/weights_checker": {"ranks": [{"checksums": checksums}]}}


def test_the_folders_own_weights_are_accepted(folder: Path) -> None:
    with answering(held(folder)) as endpoint:
        check_loaded(endpoint, folder, dtype="bfloat16", exact=True)


def test_other_weights_under_the_same_path_are_refused(folder: Path) -> None:
    with answering(held(folder, **{O_PROJ: torch.zeros(4, 4).bfloat16()})) as endpoint:
        with pytest.raises(ChecksumMismatch, match=r"self_attn\.o_proj\.weight and 0 more of 2 tensors differ from "):
            check_loaded(endpoint, folder, dtype="bfloat16", exact=True)
        check_loaded(endpoint, folder, dtype="bfloat16", exact=False)  # a GPU hashes in another way


def test_another_folder_is_refused_on_every_device(folder: Path) -> None:
    with answering(held(folder)) as endpoint, pytest.raises(ChecksumMismatch, match=rf"serves {folder}, expected /other"):
        check_loaded(endpoint, Path("/other"), dtype="bfloat16", exact=False)


def test_a_relative_model_folder_never_reaches_a_server() -> None:
    with pytest.raises(ValueError, match=r"^model\.path: runs/policy is relative, expected an absolute path$"):
        ServerSettings(model_path=Path("runs/policy"), device="cpu", tp=1, dtype="float32", seed=0, deterministic=True)
