"""The kernel's count of this process's memory at its fullest."""

from __future__ import annotations

from parallel.memory_watch import peak_rss_bytes, reset_peak_rss


def test_a_peak_is_remembered_until_it_is_reset() -> None:
    reset_peak_rss()
    before = peak_rss_bytes()
    block = bytearray(b"x") * (300 << 20)
    del block
    assert peak_rss_bytes() > before + (250 << 20)
    reset_peak_rss()
    assert peak_rss_bytes() < before + (150 << 20)
