"""Servers without a model, for tests of what servers are told."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.rollout.weights.control_stub import Stub, serve_stubs


@pytest.fixture
def control_stub() -> Iterator[Callable[..., Stub]]:
    yield from serve_stubs()
