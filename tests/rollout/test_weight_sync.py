"""Buckets, and what a weight sync does when servers are not there."""

from __future__ import annotations

import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch

from rollout.checksums import check_equal
from rollout.weight_sync import CollectiveWeightSync, DiskWeightSync, WeightSyncFailed, fill_buckets

ROOT = Path(__file__).resolve().parents[2]


def test_buckets_hold_every_tensor_once_and_are_no_larger_than_asked() -> None:
    tensors = [(f"t{i}", torch.zeros(size)) for i, size in enumerate([10, 20, 5, 300, 1, 1, 40, 30])]
    buckets = list(fill_buckets(iter(tensors), bucket_bytes=160))
    assert [name for bucket in buckets for name, _ in bucket] == [name for name, _ in tensors]
    sizes = [sum(tensor.nbytes for _, tensor in bucket) for bucket in buckets]
    assert sizes == [140, 1200, 8, 160, 120], "only a tensor that is larger itself makes a larger bucket"


def test_every_tensor_of_a_flat_bucket_starts_at_a_multiple_of_its_item_size() -> None:
    dtypes = [torch.bfloat16, torch.float32, torch.int8, torch.bfloat16, torch.float64, torch.float32]
    [bucket] = fill_buckets(((str(i), torch.zeros(3, dtype=dtype)) for i, dtype in enumerate(dtypes)), bucket_bytes=10_000)
    offset = 0
    for _, tensor in bucket:
        assert offset % tensor.itemsize == 0
        offset += tensor.nbytes
    assert sorted(name for name, _ in bucket) == [str(i) for i in range(6)]


def test_buckets_are_filled_as_tensors_stream_by() -> None:
    taken = []

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for i in range(6):
            taken.append(i)
            yield str(i), torch.zeros(10)

    buckets = fill_buckets(stream(), bucket_bytes=80)
    next(buckets)
    assert taken == [0, 1, 2], "two full tensors, and the one that did not fit"


@pytest.fixture
def refusing_server() -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(400)
            content = b'{"success": false, "message": "group is taken"}'
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_server_that_refuses_to_join_is_named_at_once_and_not_waited_for(refusing_server: str) -> None:
    began = time.monotonic()
    with pytest.raises(
        WeightSyncFailed,
        match=rf"cannot join the weight sync group: .*{refusing_server}/init_weights_update_group: HTTP 400.*group is taken",
    ):
        CollectiveWeightSync([refusing_server], timeout_s=120)
    assert time.monotonic() - began < 10


def test_server_that_is_gone_is_named(tmp_path: object) -> None:
    sync = DiskWeightSync(["http://127.0.0.1:9"], write_checkpoint=lambda folder, tensors: None, directory=tmp_path, timeout_s=5)  # type: ignore[arg-type]
    sync._complete._names = frozenset()  # as after a first publish
    with pytest.raises(
        WeightSyncFailed, match=r"policy version 1 is not in all servers.*http://127\.0\.0\.1:9/pause_generation: .*refused"
    ):
        sync.publish(1, iter(()))
    with pytest.raises(WeightSyncFailed, match="unknown weights"):
        sync.publish(2, iter(()))
    sync.close()


def test_no_endpoints_are_refused() -> None:
    with pytest.raises(ValueError, match="no endpoints"):
        CollectiveWeightSync([])


def test_failed_publish_does_not_wait_for_a_server_that_hangs_and_lets_the_process_exit(refusing_server: str, tmp_path: Path) -> None:
    with socket.socket() as silent:  # takes connections, never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        code = f"""
            import time
            from pathlib import Path
            from rollout.weight_sync import DiskWeightSync, WeightSyncFailed
            endpoints = ["http://127.0.0.1:{silent.getsockname()[1]}", {refusing_server!r}]
            sync = DiskWeightSync(endpoints, write_checkpoint=lambda folder, tensors: None, directory=Path({str(tmp_path)!r}), timeout_s=60)
            sync._complete._names = frozenset()  # as after a first publish
            print(time.time(), flush=True)
            try:
                sync.publish(1, iter(()))
            except WeightSyncFailed as failed:
                print(failed)
        """
        process = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, timeout=50)
    began, message = process.stdout.splitlines()
    assert "group is taken" in message
    assert time.time() - float(began) < 2


@pytest.fixture
def server_with_keys() -> Iterator[tuple[str, list[tuple[str, str | None]]]]:
    """Answers everything and remembers (path, authorization)."""
    seen: list[tuple[str, str | None]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("content-length") or 0))
            seen.append((self.path, self.headers.get("authorization")))
            content = b'{"weight_version": "1", "ranks": [{"checksums": {}}]}'
            self.send_response(200)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", seen
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("api_key", "admin_key", "telling", "controlling"),
    [
        ("a", "b", "Bearer a", "Bearer b"),
        ("a", None, "Bearer a", "Bearer a"),
        (None, "b", None, "Bearer b"),
        (None, None, None, None),
    ],
)
def test_each_endpoint_gets_the_key_it_accepts(
    server_with_keys: tuple[str, list[tuple[str, str | None]]],
    tmp_path: Path,
    api_key: str | None,
    admin_key: str | None,
    telling: str | None,
    controlling: str | None,
) -> None:
    endpoint, seen = server_with_keys
    sync = DiskWeightSync(
        [endpoint],
        write_checkpoint=lambda folder, tensors: list(tensors) and None,
        directory=tmp_path,
        api_key=api_key,
        admin_key=admin_key,
    )
    sync.publish(1, iter(()))
    check_equal({}, endpoint, api_key=api_key, admin_key=admin_key)
    assert {"/model_info", "/pause_generation", "/weights_checker", "/continue_generation"} <= {path for path, _ in seen}
    for path, key in seen:
        assert key == (telling if path == "/model_info" else controlling), path
