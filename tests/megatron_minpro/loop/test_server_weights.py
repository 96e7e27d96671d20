"""How many versions a run keeps for its servers, what one server is given, and that it is checked then."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from megatron_minpro.config import load_config
from megatron_minpro.loop.server_weights import RollingWeights
from megatron_minpro.registry import PlugInError
from megatron_minpro.run.weight_sync import WeightSyncContext, make_server_weights
from rollout.weights.checksums import ChecksumMismatch, tensor_checksum
from rollout.weights.keeper import DiskKeeper
from rollout.weights.weight_sync import WeightSyncFailed
from tests.rollout.weights.control_stub import Stub, serve_stubs

REPOSITORY = Path(__file__).resolve().parents[3]
NORM = "model.norm.weight"


@pytest.fixture
def control_stub() -> Iterator[Callable[..., Stub]]:
    yield from serve_stubs()


def weights_of(version: int) -> Iterator[tuple[str, torch.Tensor]]:
    yield NORM, torch.full((2,), float(version))


def rolling(directory: Path, server: Stub) -> RollingWeights:
    def write(folder: Path, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        folder.mkdir(exist_ok=True)
        assert len(list(tensors)) == 1
        assert len(list(directory.iterdir())) <= 2, "three versions need room at once"

    keeper = DiskKeeper([server.endpoint], write_checkpoint=write, directory=directory)
    return RollingWeights(keeper, dtype=torch.float32, api_key=None, admin_key=None)


def test_the_two_newest_versions_are_kept(control_stub: Callable[..., Stub], tmp_path: Path) -> None:
    server = control_stub(parameters={NORM: ""})
    weights = rolling(tmp_path, server)
    for version in (0, 0, 4, 8):  # a version that is published again is one version
        weights.publish(version, weights_of(version))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["version_4", "version_8"]
    for version in (8, 4):
        weights.give(server.endpoint, version)
        assert server.version == str(version)
    with pytest.raises(RuntimeError, match="policy version 0 are wanted"):
        weights.give(server.endpoint, 0)


def test_a_server_is_checked_when_it_is_given_weights(control_stub: Callable[..., Stub], tmp_path: Path) -> None:
    server = control_stub(parameters={NORM: tensor_checksum(torch.full((2,), 4.0))})
    weights = rolling(tmp_path, server)
    for version in (4, 8):
        weights.publish(version, weights_of(version))
        weights.check(weights_of(version))
    weights.give(server.endpoint, 4)
    with pytest.raises(ChecksumMismatch, match=r"model\.norm\.weight differs"):
        weights.give(server.endpoint, 8)


def test_a_server_that_dies_while_it_is_checked_has_not_taken_them(control_stub: Callable[..., Stub], tmp_path: Path) -> None:
    server = control_stub(parameters={NORM: ""})
    weights = rolling(tmp_path, server)
    weights.publish(4, weights_of(4))
    weights.give(server.endpoint, 4)
    weights.check(weights_of(4))
    server.answers = {"weights_checker": "break off"}
    with pytest.raises(WeightSyncFailed, match="policy version 4: http"):
        weights.give(server.endpoint, 4)


def test_a_weight_sync_that_keeps_nothing_is_refused_with_rolling_publish(tmp_path: Path) -> None:
    changes = ["rollout.publish=rolling", "rollout.servers=2", "rollout.weight_sync=megatron_minpro.run.weight_sync:disk"]
    config = load_config(REPOSITORY / "configs/tiny_moe_cpu.yaml", changes)
    context = WeightSyncContext(config=config, run_dir=tmp_path, endpoints=["http://a", "http://b"], api_key=None, admin_key=None)
    with pytest.raises(PlugInError, match=r"rollout.weight_sync = 'megatron_minpro\S*:disk': expected offer, give and forget"):
        make_server_weights(context)
