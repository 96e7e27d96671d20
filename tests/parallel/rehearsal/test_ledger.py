"""The ledger against sizes counted by hand. It counts storages of any device; these lie on the CPU."""

from __future__ import annotations

import torch

from parallel.rehearsal.ledger import MemoryLedger


def test_sizes_are_rounded_up_and_views_cost_nothing() -> None:
    ledger = MemoryLedger()
    ledger.begin()
    x = torch.zeros(1000)  # 4000 bytes: 8 blocks of 512
    ledger.track(x)
    ledger.track(x.view(10, 100)[3:])
    assert ledger.live == 4096
    del x
    assert ledger.live == 0
    assert ledger.end().peak == 4096


def test_a_storage_that_is_emptied_in_place_frees_its_memory() -> None:
    ledger = MemoryLedger()
    ledger.begin()
    x = torch.zeros(256)
    ledger.track(x)
    for size, live in ((0, 0), (4096, 4096)):
        x.untyped_storage().resize_(size)
        ledger.resized(x.untyped_storage())
        assert ledger.live == live
    del x
    assert ledger.live == 0


def test_the_peak_is_split_by_what_lived_at_that_moment() -> None:
    ledger = MemoryLedger()
    weights = torch.zeros(128)
    ledger.track(weights)
    ledger.begin()
    ledger.mark(weights, "parameters")
    early = torch.zeros(256)
    ledger.track(early)
    ledger.save_for_backward(early)
    passing = torch.zeros(512)
    ledger.track(passing)
    del passing
    late = torch.zeros(128)
    ledger.track(late)
    memory = ledger.end()
    assert (memory.before, memory.peak, memory.after) == (512, 512 + 1024 + 2048, 512 + 1024 + 512)
    assert memory.by_kind == {"parameters": 512, "activations": 1024, "temporary": 2048}
    assert sum(holder.num_bytes for holder in memory.holders) == memory.peak


def test_a_tensor_saved_after_the_peak_is_temporary_at_it() -> None:
    ledger = MemoryLedger()
    ledger.begin()
    x, y = torch.zeros(128), torch.zeros(128)
    ledger.track(x)
    ledger.track(y)
    del y
    ledger.save_for_backward(x)
    memory = ledger.end()
    assert memory.by_kind == {"temporary": 1024}
    assert memory.timeline[-1] == (0, 0, 0, 0, 512, 0)


def test_the_timeline_begins_with_what_is_alive_and_reaches_the_peak() -> None:
    ledger = MemoryLedger()
    ledger.begin()
    kept = [torch.zeros(128) for _ in range(5)]
    for tensor in kept:
        ledger.track(tensor)
        gone = torch.zeros(128)
        ledger.track(gone)
        del gone
    memory = ledger.end()
    assert max(map(sum, memory.timeline)) == memory.peak == 6 * 512
    assert sum(memory.timeline[0]) == 0
    assert sum(memory.timeline[-1]) == memory.after == 5 * 512
    ledger.begin()
    del tensor
    kept.pop()
    memory = ledger.end()
    assert [sum(point) // 512 for point in memory.timeline] == [5, 5, 4]
    assert (memory.before, memory.after) == (5 * 512, 4 * 512)
