"""Routing replay on the CUDA path: it runs to its end and makes the host wait for the device once a pass, at the pass's end."""

from __future__ import annotations

from collections import Counter

from parallel.rehearsal.launch import rehearse
from parallel.rehearsal.result import RehearsalResult
from tests.parallel.rehearsal.tiny import DEEP, importable_tests, request


def waits(result: RehearsalResult) -> Counter[str]:
    assert result.fault is None
    return Counter({f"{wait.what} {wait.site.partition(':')[0]}": wait.count for wait in result.phase("update").waits})


def test_replay_waits_for_the_device_once_at_the_end_of_each_pass() -> None:
    update = "tests.parallel.rehearsal.replaying_update:record_and_replay"
    with importable_tests():
        plain, replayed = rehearse(
            [
                request(
                    DEEP, world_size=8, pp=2, vpp=2, tp=2, ep=2, phases=("build", "update"), update=update, update_options={"replay": on}
                )
                for on in (False, True)
            ]
        )
    more = waits(replayed) - waits(plain)
    assert more.total() == 3, more  # two scoring passes and an update
    assert not waits(plain) - waits(replayed)
