"""What a keeper holds, and what one server is told when it is given weights; others are told nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rollout.weights.keeper import CollectiveKeeper, DiskKeeper
from rollout.weights.weight_sync import WeightSyncFailed
from tests.rollout.weights.control_stub import Stub


def disk_keeper(directory: Path, *servers: Stub) -> DiskKeeper:
    def write(folder: Path, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        folder.mkdir()
        save_file(dict(tensors), folder / "model.safetensors")

    return DiskKeeper([server.endpoint for server in servers], write_checkpoint=write, directory=directory)


def weights(value: float) -> Iterator[tuple[str, torch.Tensor]]:
    yield "model.norm.weight", torch.full((2,), value)


def test_each_server_is_given_the_version_that_it_is_to_have(control_stub: Callable[..., Stub], tmp_path: Path) -> None:
    first, second = control_stub(parameters={"model.norm.weight": ""}), control_stub(parameters={"model.norm.weight": ""})
    keeper = disk_keeper(tmp_path, first, second)
    for version in (4, 8):
        keeper.offer(version, weights(version))
    assert not first.told and not second.told, "keeping alone tells nobody anything"
    keeper.give(first.endpoint, 8)
    assert (first.version, second.version) == ("8", "0") and not second.told
    keeper.give(second.endpoint, 4)
    keeper.give(first.endpoint, 4)  # back: another server's share of an older batch
    assert (first.version, second.version) == ("4", "4") and first.steps[-1] == "continue_generation"
    loaded = [body["model_path"] for name, body in first.told if name == "update_weights_from_disk"]
    assert [load_file(Path(path) / "model.safetensors")["model.norm.weight"].tolist() for path in loaded] == [[8.0] * 2, [4.0] * 2]
    assert keeper.num_restarts == 0


def test_a_forgotten_version_cannot_be_given_and_takes_no_room(control_stub: Callable[..., Stub], tmp_path: Path) -> None:
    server = control_stub(parameters={"model.norm.weight": ""})
    for left in ("version_2", ".version_3.partial-0123abcd"):  # by an attempt that was killed, also while it wrote
        (tmp_path / left).mkdir()
    for keeper in (disk_keeper(tmp_path, server), CollectiveKeeper([server.endpoint])):
        for version in (4, 8):
            keeper.offer(version, weights(version))
        keeper.forget(4)
        keeper.forget(4)
        with pytest.raises(RuntimeError, match=r"policy version 4 are wanted; kept are those of \[8\]"):
            keeper.give(server.endpoint, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["version_8"]


def test_kept_weights_are_a_copy_that_training_does_not_change(control_stub: Callable[..., Stub]) -> None:
    parameter = torch.ones(2)
    keeper = CollectiveKeeper([control_stub().endpoint])
    keeper.offer(1, iter([("a", parameter)]))
    parameter += 1
    assert keeper._kept[1][0][1].tolist() == [1.0, 1.0]


def test_a_server_that_refuses_weights_can_be_given_them_again(control_stub: Callable[..., Stub], tmp_path: Path) -> None:
    server = control_stub(parameters={"model.norm.weight": ""}, update_weights_from_disk="refuse")
    keeper = disk_keeper(tmp_path, server)
    keeper.offer(4, weights(4))
    with pytest.raises(WeightSyncFailed, match=r"policy version 4: no server took it: .*update_weights_from_disk: HTTP 400"):
        keeper.give(server.endpoint, 4)
    assert "unfinished update to 4" in server.version
    server.answers = {}
    keeper.give(server.endpoint, 4)
    server.version = "-1"  # restarted
    keeper.give(server.endpoint, 4)
    assert (server.version, keeper.num_restarts) == ("4", 1)


def test_missing_tensors_are_found_before_the_server_is_told(control_stub: Callable[..., Stub], tmp_path: Path) -> None:
    server = control_stub(parameters={"model.norm.weight": "", "lost.weight": ""})
    keeper = disk_keeper(tmp_path, server)
    keeper.offer(4, weights(4))
    with pytest.raises(ValueError, match=r"never sent to the server: \['lost.weight'\]"):
        keeper.give(server.endpoint, 4)
    assert "pause_generation" not in server.steps and server.version == "0"
    with pytest.raises(ValueError, match=r"model.norm.weight came twice"):
        keeper.offer(8, iter([*weights(8), *weights(8)]))
