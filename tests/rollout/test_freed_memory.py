"""Freed memory stays with the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

_ROUNDS, _BLOCK = 10, 2**25
_PROGRAM = f"""
import ctypes, resource, sys
from rollout.freed_memory import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
if sys.argv[1] == "kept":
    keep_freed_memory()

def fill():
    block = ctypes.c_void_p(libc.malloc({_BLOCK}))
    libc.memset(block, 1, {_BLOCK})
    libc.free(block)

fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({_ROUNDS}):
    fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.fixture(scope="module")
def page_faults() -> dict[str, int]:
    """Of a process that fills a block of 32 MB ten times, after a first time."""
    return {
        how: int(subprocess.run([sys.executable, "-c", _PROGRAM, how], check=True, capture_output=True, text=True).stdout)
        for how in ("kept", "given back")
    }


def test_a_block_that_comes_again_costs_no_new_pages(page_faults: dict[str, int]) -> None:
    assert page_faults["kept"] < 2 * _ROUNDS


def test_without_the_setting_every_block_costs_its_pages_again(page_faults: dict[str, int]) -> None:
    """The reason for the setting; where this fails the C library has changed and the setting can go."""
    assert page_faults["given back"] > 10 * _ROUNDS  # 16 huge pages, or 8,192 small ones, each
