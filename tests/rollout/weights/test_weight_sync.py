"""Buckets, and what a weight sync does when servers are not there."""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch

from rollout.sglang.control import ServerRefused, call
from rollout.weights.broadcast_group import BroadcastGroup
from rollout.weights.buckets import fill_buckets
from rollout.weights.checksums import check_equal
from rollout.weights.collective import CollectiveWeightSync
from rollout.weights.disk import DiskWeightSync
from rollout.weights.time_limits import WeightTimeLimits
from rollout.weights.weight_sync import WeightSyncFailed
from tests.rollout.weights.control_stub import Stub

ROOT = Path(__file__).resolve().parents[3]


def test_buckets_hold_every_tensor_once_and_are_no_larger_than_asked() -> None:
    tensors = [(f"t{i}", torch.zeros(size)) for i, size in enumerate([10, 20, 5, 300, 1, 1, 40, 30])]
    buckets = list(fill_buckets(iter(tensors), bucket_bytes=160))
    assert [name for bucket in buckets for name, _ in bucket] == [name for name, _ in tensors]
    sizes = [sum(tensor.nbytes for _, tensor in bucket) for bucket in buckets]
    assert sizes == [140, 1200, 8, 160, 120], "only a tensor that is larger itself makes a larger bucket"


def test_every_tensor_of_a_flat_bucket_is_aligned_to_its_item_size() -> None:
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
def refusing_server(control_stub: Callable[..., Stub]) -> str:
    return control_stub(init_weights_update_group="refuse", pause_generation="refuse").endpoint


def disk_sync(tmp_path: Path, *endpoints: str) -> DiskWeightSync:
    def write(folder: Path, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        folder.mkdir(exist_ok=True)
        assert list(tensors) == []

    return DiskWeightSync(endpoints, write_checkpoint=write, directory=tmp_path)


def test_the_server_has_no_version_until_the_load_is_done(control_stub: Callable[..., Stub], tmp_path: Path) -> None:
    server = control_stub()
    assert disk_sync(tmp_path, server.endpoint).publish(4, iter(())) == (server.endpoint,)
    steps = ["pause_generation", "update_weight_version", "update_weights_from_disk", "update_weight_version", "continue_generation"]
    assert [step for step in server.steps if step != "weights_checker"] == steps
    unusable, version = (body["new_version"] for name, body in server.told if name == "update_weight_version")
    assert "unfinished" in unusable and version == server.version == "4"


def test_only_the_newest_checkpoint_takes_room(control_stub: Callable[..., Stub], tmp_path: Path) -> None:
    sync = disk_sync(tmp_path, control_stub().endpoint)
    left = tmp_path / ".version_3.partial-0123abcd" / "part"  # by an attempt that was killed while it wrote
    left.mkdir(parents=True)
    for version in (4, 8):
        sync.publish(version, iter(()))
        assert [path.name for path in tmp_path.iterdir()] == [f"version_{version}"]


@pytest.mark.parametrize("step", ["pause_generation", "update_weights_from_disk", "continue_generation"])
def test_a_failed_publish_is_repeated_and_the_next_version_tries_all(control_stub: Callable[..., Stub], tmp_path: Path, step: str) -> None:
    good, bad = control_stub(), control_stub(**{step: "refuse"})
    sync = disk_sync(tmp_path, good.endpoint, bad.endpoint)
    with pytest.raises(WeightSyncFailed, match=rf"^policy version 1: no server took it: {bad.endpoint}/{step}: HTTP 400"):
        sync.publish(1, iter(()))
    if step == "update_weights_from_disk":
        assert "unfinished" in good.version and "unfinished" in bad.version, "no server is asked meanwhile"
        assert good.steps[-1] != "continue_generation"
    assert sync.publish(1, iter(())) == (good.endpoint,)
    assert good.version == "1" and good.steps[-1] == "continue_generation"
    bad.answers = {}
    assert sync.publish(2, iter(())) == (good.endpoint, bad.endpoint)
    assert (good.version, bad.version, sync.num_restarts) == ("2", "2", 0)


def test_a_failed_publish_leaves_no_paused_server_with_a_wanted_version(control_stub: Callable[..., Stub], tmp_path: Path) -> None:
    good, bad = control_stub(), control_stub()
    sync = disk_sync(tmp_path, good.endpoint, bad.endpoint)
    sync.publish(1, iter(()))
    bad.refused_version = "2"
    with pytest.raises(WeightSyncFailed, match=f"{bad.endpoint}/update_weight_version"):
        sync.publish(2, iter(()))
    assert "unfinished update to 2" in good.version, "it is paused: asked for responses it would give none"
    assert sync.publish(2, iter(())) == (good.endpoint,) and good.version == "2" and sync.num_restarts == 0


def test_a_broadcast_is_given_up_when_a_server_failed_before_it(control_stub: Callable[..., Stub], monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL's first broadcast waits, without a time limit, until every server has begun it too."""
    server = control_stub(update_weights_from_distributed="refuse")
    forever = threading.Event()
    sync = CollectiveWeightSync([server.endpoint], bucket_bytes=4)
    monkeypatch.setattr(BroadcastGroup, "join", lambda group: None)
    monkeypatch.setattr(BroadcastGroup, "broadcast", lambda group, tensor: forever.wait(60))
    began = time.monotonic()
    with pytest.raises(WeightSyncFailed, match="/update_weights_from_distributed: HTTP 400"):
        sync.publish(1, iter([("a", torch.zeros(1)), ("b", torch.zeros(1))]))
    assert time.monotonic() - began < 30
    forever.set()


def test_a_late_bucket_ends_the_group_and_names_who_is_silent(control_stub: Callable[..., Stub], monkeypatch: pytest.MonkeyPatch) -> None:
    good, silent = control_stub(), control_stub(update_weights_from_distributed="hang")
    forever = threading.Event()
    closed_after: list[int] = []
    limits = WeightTimeLimits(control_s=30, step_s=2, bytes_per_s=10)  # 4 bytes: 0.4 s
    sync = CollectiveWeightSync([good.endpoint, silent.endpoint], bucket_bytes=4, limits=limits)
    monkeypatch.setattr(BroadcastGroup, "join", lambda group: None)
    monkeypatch.setattr(BroadcastGroup, "broadcast", lambda group, tensor: forever.wait(60))
    monkeypatch.setattr(BroadcastGroup, "close", lambda group: closed_after.append(len(good.steps)))
    # Whichever clock is first, that of the group or that of the call.
    expected = rf"no server took it: (broadcasting weights: not done within 2.4 s; no answer from )?{silent.endpoint}(/\S*: timed out)?$"
    with pytest.raises(WeightSyncFailed, match=expected):
        sync.publish(1, iter([("a", torch.zeros(1)), ("b", torch.zeros(1))]))
    assert good.steps[closed_after[0] - 1] == "update_weights_from_distributed", "before anything else is told"
    assert good.steps[closed_after[0] :] == ["update_weight_version", "destroy_weights_update_group", "end_weight_update"]
    forever.set()


def test_a_death_before_the_first_publish_is_checked_fails_it(control_stub: Callable[..., Stub], tmp_path: Path) -> None:
    server = control_stub(weights_checker="refuse")
    sync = disk_sync(tmp_path, server.endpoint)
    with pytest.raises(WeightSyncFailed, match=f"^cannot learn which parameters a server has: {server.endpoint}/weights_checker"):
        sync.publish(1, iter(()))
    server.answers = {}
    assert sync.publish(1, iter(())) == (server.endpoint,)


def test_a_server_on_which_all_publishes_fail_is_asked_again(control_stub: Callable[..., Stub], tmp_path: Path) -> None:
    server = control_stub(pause_generation="refuse")
    sync = disk_sync(tmp_path, server.endpoint)
    for _ in range(2):
        with pytest.raises(WeightSyncFailed, match="pause_generation"):
            sync.publish(1, iter(()))
    server.answers = {}
    assert sync.publish(1, iter(())) == (server.endpoint,)


def test_a_server_with_other_weights_than_it_was_given_counts_as_restarted(control_stub: Callable[..., Stub], tmp_path: Path) -> None:
    servers = [control_stub(), control_stub()]
    sync = disk_sync(tmp_path, *(server.endpoint for server in servers))
    sync.publish(1, iter(()))
    servers[1].version = "-1"
    sync.publish(2, iter(()))
    sync.publish(3, iter(()))
    assert sync.num_restarts == 1 and [server.version for server in servers] == ["3", "3"]


def test_an_error_that_breaks_off_in_the_middle_is_an_error_like_any_other() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 500 Error\r\nContent-Length: 100\r\n\r\nshort")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing resets the connection
            connection.close()

        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(ServerRefused, match="/health: HTTP 500"):
            call(f"http://127.0.0.1:{listener.getsockname()[1]}", "/health", key=None, timeout_s=10)


def test_server_that_refuses_to_join_is_named_at_once_and_not_waited_for(refusing_server: str) -> None:
    began = time.monotonic()
    sync = CollectiveWeightSync([refusing_server])
    with pytest.raises(
        WeightSyncFailed,
        match=rf"cannot join the weight sync group: .*{refusing_server}/init_weights_update_group: HTTP 400.*group is taken",
    ):
        sync.publish(1, iter([("weight", torch.zeros(1))]))
    assert time.monotonic() - began < 10


def test_server_that_is_gone_is_named(tmp_path: object) -> None:
    sync = DiskWeightSync(["http://127.0.0.1:9"], write_checkpoint=lambda folder, tensors: None, directory=tmp_path)  # type: ignore[arg-type]
    for version in (1, 2):
        with pytest.raises(
            WeightSyncFailed, match=rf"policy version {version}: no server answers: http://127\.0\.0\.1:9/server_info: .*refused"
        ):
            sync.publish(version, iter(()))
    sync.close()


def test_no_endpoints_are_refused() -> None:
    with pytest.raises(ValueError, match="no endpoints"):
        CollectiveWeightSync([])


def test_a_failed_publish_waits_for_no_hanging_server(refusing_server: str, control_stub: Callable[..., Stub], tmp_path: Path) -> None:
    code = f"""
        import time
        from pathlib import Path
        from rollout.weights.disk import DiskWeightSync
        from rollout.weights.weight_sync import WeightSyncFailed
        endpoints = [{control_stub(pause_generation="hang").endpoint!r}, {refusing_server!r}]
        sync = DiskWeightSync(endpoints, write_checkpoint=lambda folder, tensors: None, directory=Path({str(tmp_path)!r}))
        print(time.time(), flush=True)
        try:
            sync.publish(1, iter(()))
        except WeightSyncFailed as failed:
            print(failed)
    """
    process = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, timeout=500)
    began, message = process.stdout.splitlines()
    assert "group is taken" in message
    assert time.time() - float(began) < 5


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
        assert key == (telling if path in ("/model_info", "/server_info") else controlling), path
