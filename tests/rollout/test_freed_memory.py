"""Freed memory stays with the process."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from rollout.freed_memory import keep_freed_memory

_ROUNDS, _BLOCKS, _BLOCK = 10, 3, 2**24
_PROGRAM = f"""
import ctypes, resource, sys
from rollout.freed_memory import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
if sys.argv[1] == "kept":
    keep_freed_memory()

def fill():
    blocks = [ctypes.c_void_p(libc.malloc({_BLOCK})) for _ in range({_BLOCKS})]
    for block in blocks:
        libc.memset(block, 1, {_BLOCK})
    for block in blocks:
        libc.free(block)

fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({_ROUNDS}):
    fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.fixture(scope="module")
def page_faults() -> dict[str, int]:
    """Of a process that fills three blocks of 16 MB ten times, after a first time. Every glibc can keep blocks of this size."""
    return {
        how: int(subprocess.run([sys.executable, "-c", _PROGRAM, how], check=True, capture_output=True, text=True).stdout)
        for how in ("kept", "given back")
    }


def test_blocks_that_come_again_cost_no_new_pages(page_faults: dict[str, int]) -> None:
    assert page_faults["kept"] < 2 * _ROUNDS


def test_without_the_setting_the_blocks_cost_their_pages_again(page_faults: dict[str, int]) -> None:
    """The reason for the setting; where this fails the C library has changed and the setting can go."""
    assert page_faults["given back"] > 10 * _ROUNDS  # 24 huge pages, or 12,288 small ones, each round


class OldLibrary:
    """glibc before 2.35: larger blocks than 32 MB cannot be kept."""

    def __init__(self, *, largest: int) -> None:
        self.largest = largest
        self.taken: dict[int, int] = {}

    def mallopt(self, setting: int, value: int) -> int:
        if setting == -3 and value > self.largest:
            return 0
        self.taken[setting] = value
        return 1


def test_an_older_library_keeps_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    old = OldLibrary(largest=2**25)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: old)
    keep_freed_memory()
    assert old.taken == {-3: 2**25, -1: 2**30}


def test_a_library_that_keeps_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: OldLibrary(largest=0))
    with pytest.raises(RuntimeError, match=r"mallopt\(-3, 33554432\) was refused"):
        keep_freed_memory()
