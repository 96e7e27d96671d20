"""Fixtures that several folders of tests share."""

from __future__ import annotations

import os
import subprocess
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from jaxtyping import config as jaxtyping_config

from tests import shape_checks
from tests.rank_pool import RankPool

shape_checks.install()

REPOSITORY = Path(__file__).resolve().parent.parent

# A server of another engine in an environment of its own: its tests exist where somebody names that environment.
collect_ignore = [] if "MINPRO_VLLM_PYTHON" in os.environ else ["vllm"]

# Several workers (make test) share the cores. The tests of one group run in one worker, in order, and share its servers, models and
# clusters; the longest groups begin first. The longest beginning of a path decides. Every other file is a group of its own.
GROUPS = (
    ("tests/slurm/", "slurm"),
    ("tests/end_to_end/", "end_to_end"),
    ("tests/end_to_end/test_schedules.py", "schedules"),  # a third of them; a finished run of its own costs less than waiting for one
    ("tests/rollout/test_servers_under_fire.py", "two_servers"),
    ("tests/end_to_end/test_calculator.py", "calculator"),  # its own model, so it need not wait for the others
    ("tests/end_to_end/test_dapo.py", "dapo"),
    ("tests/parallel/test_actor.py", "actors"),
    ("tests/parallel/rehearsal/test_layouts.py", "rehearsal"),
    ("tests/parallel/test_megatron_overlay.py", "overlay"),
    ("tests/rollout/sglang/", "one_server"),
    ("tests/parallel/test_converted_checkpoints.py", "converted"),
    ("tests/megatron_minpro/run/", "run"),
    ("tests/megatron_minpro/commands/test_scale.py", "scale"),
)

SHOWN_GROUPS, SHOWN_S = 60, 5.0  # of the table of times: at most so many rows, of at least so many seconds
PARITY = "parity"  # the user property of a test that leaves a row for the table below
PARITY_COLUMNS = ("model", "layout", "log-probs", "gradients", "grad norms", "weights")


def group_of(nodeid: str) -> str:
    """The group of a test, or of its file."""
    path = nodeid.partition("::")[0]
    groups = [(len(prefix), name) for prefix, name in GROUPS if path.startswith(prefix)]
    return max(groups)[1] if groups else path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The groups in order."""
    ranks = {name: rank for rank, (_, name) in enumerate(GROUPS)}
    items.sort(key=lambda item: ranks.get(group_of(item.nodeid), len(ranks)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Whole groups to one process. pytest-xdist's own way, a suffix of the test's id, has no effect under pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class GroupScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return GroupScheduling(config, log)


_cpu_s = 0.0  # of this process and of all that it has started and that have ended, when the last report was made


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    """Each report says how many seconds of processor time the phase took."""
    global _cpu_s
    report = yield
    now = sum(os.times()[:4])
    report.cpu_s, _cpu_s = now - _cpu_s, now
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Where the time went, and how exact the layouts are."""
    reports = [report for kind in ("passed", "failed", "error", "") for report in terminalreporter.stats.get(kind, ())]
    _write_times(terminalreporter, reports)
    _write_parity(terminalreporter, reports)


def _write_times(terminalreporter: Any, reports: list[Any]) -> None:
    """Seconds of each group's tests and fixtures, while others ran beside them, and of the processors."""
    seconds: Counter[str] = Counter()
    cpu: defaultdict[str, float] = defaultdict(float)  # without the jobs of Slurm, which are not our children
    for report in reports:
        seconds[group_of(report.nodeid)] += getattr(report, "duration", 0.0)  # a file that cannot be imported has none
        cpu[group_of(report.nodeid)] += getattr(report, "cpu_s", 0.0)
    longest = [(group, spent) for group, spent in seconds.most_common(SHOWN_GROUPS) if spent >= SHOWN_S]
    if longest:
        terminalreporter.section("seconds by group of tests (tests/conftest.py)")
        terminalreporter.write_line("   time     cpu")
        for group, spent in longest:
            terminalreporter.write_line(f"{spent:7.0f} {cpu[group]:7.0f}  {group}")
        terminalreporter.write_line(f"        {sum(cpu.values()):7.0f}  of all")


def _write_parity(terminalreporter: Any, reports: list[Any]) -> None:
    """Largest relative errors against one process of transformers and torch, fp32; weights: absolute, after three steps."""
    rows = [tuple(row) for report in reports for name, row in report.user_properties if name == PARITY and report.when == "call"]
    if not rows:
        return
    widths = [max(len(row[i]) for row in (PARITY_COLUMNS, *rows)) for i in range(len(PARITY_COLUMNS))]
    terminalreporter.section("parity of MinPRO on every layout with transformers, fp32: largest relative error, after 3 steps")
    for row in (PARITY_COLUMNS, *rows):
        terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Makes a file system of so many bytes, in memory, and says where. Only root may; in CI that is a failure."""
    folder = tmp_path / "disk"

    def mount(size: int) -> Path:
        folder.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, text=True)
        if mounted.returncode:
            reason = f"a small disk cannot be mounted here: {mounted.stderr.strip()}"
            if os.environ.get("CI", "").lower() in ("1", "true"):
                pytest.fail(reason)
            pytest.skip(reason)
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def unchecked_shapes() -> Iterator[None]:
    """No shape is checked from outside: for tests of what the code itself says about a wrong one."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder with the real data sets and the real tokenizer, named by MINPRO_ASSETS (default: `shared` beside the checkout).

    Where it is absent the test is skipped; in CI (CI=true) that is a failure, so that nobody believes it ran.
    """
    folder = Path(os.environ.get("MINPRO_ASSETS", REPOSITORY.parent / "shared")).resolve()
    needed = [folder / "data/train/dapo_math_17k.parquet", folder / "models/qwen3_30b_a3b/tokenizer.json"]
    absent = [str(path) for path in needed if not path.is_file()]
    if absent:
        reason = f"no {', '.join(absent)}; MINPRO_ASSETS names the folder that holds data/ and models/"
        if os.environ.get("CI", "").lower() in ("1", "true"):
            pytest.fail(reason)
        pytest.skip(reason)
    return folder


@pytest.fixture(scope="session")
def qwen_tokenizer(assets: Path) -> Any:
    """The real Qwen3 tokenizer with its chat template."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(assets / "models/qwen3_30b_a3b")


@pytest.fixture(scope="session")
def chain_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tokenizer of arithmetic_chains: one token per word, unknown words become <|unknown|>."""
    from megatron_minpro.tasks.arithmetic_chains.tokenizer import build_tokenizer

    return build_tokenizer(tmp_path_factory.mktemp("chain_tokenizer"))


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Runs scripts on trainer ranks."""
    with RankPool() as pool:
        yield pool


@pytest.fixture
def one_rank_group() -> Iterator[Any]:
    """torch.distributed with this process as its only rank (gloo); the world's group."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()
