"""A rehearsal's result as plain tables: `view.py` draws them on a terminal, and they become Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from parallel.rehearsal.ledger_kinds import KINDS
from parallel.rehearsal.result import PhaseResult, RehearsalResult

GB = 1e9
_HOLDERS, _WAITS, _COLLECTIVES = 12, 15, 14

# What a figure leaves out, for people.
NOT_MODELLED = (
    "gaps between blocks of the allocator, and blocks whose free waits for another stream",
    "workspaces of cuBLAS and NCCL, the CUDA context (reserved_gb of the hardware file stands for all of these)",
    "how long anything takes",
    "TransformerEngine's layers: the rehearsed layers are this project's own",
    "torch.compile: Megatron's small fused functions run operator by operator, with larger temporaries",
    "uneven routing: every expert gets equally many tokens",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """title, header, rows. The columns from `text_columns` on hold numbers."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text_columns: int = 1

    def markdown(self) -> str:
        """A Markdown table under its title."""
        rule = ["---" if index < self.text_columns else "---:" for index in range(len(self.header))]
        lines = [" | ".join(row) for row in (self.header, rule, *self.rows)]
        return f"**{self.title}**\n\n" + "\n".join(f"| {line} |" for line in lines)


def gigabytes(num_bytes: float) -> str:
    """Bytes in GB (10^9): one digit behind the point from 10 GB on, two below, three below 0.1 GB."""
    digits = 1 if num_bytes >= 10 * GB else 2 if num_bytes >= 0.1 * GB else 3
    return f"{num_bytes / GB:.{digits}f}" if num_bytes else "0"


def _numbers(phase: PhaseResult, kinds: Sequence[str]) -> tuple[int, ...]:
    return (phase.before, phase.peak, phase.after, *(phase.by_kind.get(kind, 0) for kind in kinds), phase.host_peak)


def memory_table(result: RehearsalResult) -> Table:
    """Peak of every phase, split by kind; host: the rank's large tensors in host memory."""
    kinds = [kind for kind in KINDS if any(phase.by_kind.get(kind) for phase in result.phases)]
    return Table(
        title=f"memory of rank {result.request.rank}, GB",
        header=("phase", "before", "peak", "after", *kinds, "host"),
        rows=tuple((phase.name, *map(gigabytes, _numbers(phase, kinds))) for phase in result.phases),
    )


def holders_table(phase: PhaseResult) -> Table:
    """Who holds the most at the phase's fullest moment."""
    return Table(
        title=f"largest holders at the peak of {phase.name}, GB",
        header=("kind", "made at", "GB"),
        rows=tuple((each.kind, each.site, gigabytes(each.num_bytes)) for each in phase.holders[:_HOLDERS]),
        text_columns=2,
    )


def collectives_table(phases: Iterable[PhaseResult]) -> Table:
    """Collectives of each phase, the largest first."""
    return Table(
        title="collectives; GB that this rank hands over",
        header=("phase", "kind", "group", "backend", "ranks", "calls", "GB"),
        rows=tuple(
            (phase.name, each.kind, each.group, each.backend, str(each.size), str(each.calls), gigabytes(each.bytes_in))
            for phase in phases
            for each in phase.collectives[:_COLLECTIVES]
        ),
        text_columns=4,
    )


def waits_table(phases: Iterable[PhaseResult]) -> Table:
    """Where the host waits for the device, and how many kernels a phase launches."""
    rows = []
    for phase in phases:
        rows.append((phase.name, "all", f"{phase.kernels:,} kernels", str(phase.num_waits)))
        rows += [(phase.name, each.what, each.site, str(each.count)) for each in phase.waits[:_WAITS]]
    return Table(
        title="the host waits for the device",
        header=("phase", "for", "at", "times"),
        rows=tuple(rows),
        text_columns=3,
    )


def all_tables(result: RehearsalResult) -> Sequence[Table]:
    """Everything that is shown of one rank."""
    busy = [phase for phase in result.phases if phase.name in ("score", "update", "export")]
    return (
        memory_table(result),
        holders_table(result.fullest),
        collectives_table(busy),
        waits_table(busy),
    )
