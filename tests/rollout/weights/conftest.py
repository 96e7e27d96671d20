"""Servers without a model, for tests of what servers are told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.rollout.weights.control_stub import Stub


@pytest.fixture
def control_stub() -> Iterator[Callable[..., Stub]]:
    made: list[Stub] = []

    def make(**options: Any) -> Stub:
        made.append(Stub(**options))
        return made[-1]

    yield make
    for one in made:
        one.released.set()
        one.server.shutdown()
        one.server.server_close()
