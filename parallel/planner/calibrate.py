"""What this machine's CPU reaches, one thread per rank, as the content of a hardware file."""

from __future__ import annotations

import datetime
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

_REPEATS = 7


def measure(*, progress: Callable[[str], None] = lambda what: None) -> str:
    """YAML for configs/hardware/cpu.yaml. Takes about ten seconds; progress(what is being measured)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        peaks = {}
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            progress(f"{name} products")
            peaks[name] = _product_tflops(dtype)
        progress("memory")
        bandwidth = _copy_gbs()
        progress("launches")
        launch = _launch_us()
    finally:
        torch.set_num_threads(threads)
    progress("gloo")
    rate, latency = _gloo()
    cores = os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return (
        f"# This machine's CPU, measured by minpro plan --calibrate on {datetime.date.today()}: one rank, one thread.\n"
        f"description: CPU, {cores} cores, gloo\n"
        f"peak_tflops: {{fp32: {peaks['fp32']:.4g}, bf16: {peaks['bf16']:.4g}}}\n"
        "sustained: 1.0\n"
        f"memory_gb: {memory / cores:.1f}\n"
        f"memory_bandwidth_gbs: {bandwidth:.3g}\n"
        f"nvlink_domain: {cores}                        # ranks that share this memory\n"
        f"nvlink_gbs: {rate:.3g}\n"
        f"network_gbs: {rate:.3g}\n"
        f"nvlink_latency_us: {latency:.0f}\n"
        f"network_latency_us: {latency:.0f}\n"
        f"launch_us: {launch:.2g}\n"
        "reserved_gb: 0.5\n"
        "measured: true\n"
    )


def _fastest(function: Callable[[], object]) -> float:
    """Seconds of the fastest of several calls after one that warms up: other processes only ever add."""
    function()
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def _product_tflops(dtype: torch.dtype) -> float:
    size = 768
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    return 2e-12 * size**3 / _fastest(lambda: a @ b)


def _copy_gbs() -> float:
    """Bytes read and written per second by a copy far larger than the caches."""
    source = torch.zeros(16 << 20)
    target = torch.empty_like(source)
    return 2e-9 * source.numel() * source.element_size() / _fastest(lambda: target.copy_(source))


def _launch_us() -> float:
    x = torch.zeros(8)

    def many() -> None:
        for _ in range(1000):
            x.add_(1.0)

    return 1e6 * _fastest(many) / 1000


def _gloo() -> tuple[float, float]:
    """GB/s and latency in us of an all-gather between two ranks."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result"
        multiprocessing.spawn(_gloo_rank, args=(f"file://{folder}/store", str(out)), nprocs=2)
        rate, latency = out.read_text().split()
    return float(rate), float(latency)


def _gloo_rank(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60))

    def gather(numel: int) -> Callable[[], object]:
        mine, everyone = torch.zeros(numel), [torch.empty(numel) for _ in range(2)]
        return lambda: dist.all_gather(everyone, mine)

    latency = _fastest(gather(1))
    numel = 4 << 20
    seconds = _fastest(gather(numel))
    if rank == 0:
        Path(out).write_text(f"{1e-9 * numel * 4 / max(seconds - latency, 1e-9)} {1e6 * latency}")
    dist.destroy_process_group()
