"""The table of parallel/README.md: every layer of the shipped production runs, rehearsed.

python -m megatron_minpro.commands.rehearsal_table OUT [NAME ...] rehearses the configurations of that name (all without names), writes a
report of each into OUT, and puts the rows of all reports in OUT into the page.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from checkpoints_convert.atomic_files import write_atomically
from megatron_minpro.commands.rehearse import RehearseOptions, rehearse_run
from parallel.layout import ParallelLayout
from parallel.planner.view import layout_text
from parallel.rehearsal.result import RehearsalResult
from parallel.rehearsal.tables import GB

NAMES = ("qwen3_8b", "qwen3_14b", "qwen3_30b_a3b", "qwen3_235b_a22b")
PAGE = Path(__file__).parents[2] / "parallel" / "README.md"
BEGIN, END = "<!-- rehearsed runs: make rehearse -->", "<!-- end of rehearsed runs -->"

_HEADER = (
    *("run", "layers", "layout", "rank", "build", "score", "update", "export"),
    *("plan", "plan - peak", "host at capture", "waits", "rehearsed in"),
)


def rows(ranks: Iterable[dict[str, Any]], name: str) -> Iterator[tuple[str, ...]]:
    """One for each rank of a rehearsal.json."""
    for values in ranks:
        planned = values["planned_bytes"]
        result = RehearsalResult.from_json({key: value for key, value in values.items() if key not in ("limit_bytes", "planned_bytes")})
        layout: ParallelLayout = result.request.layout
        peaks = (f"{result.phase(phase).peak / GB:.1f}" for phase in ("build", "score", "update", "export"))
        peak = result.fullest.peak
        yield (
            f"`{name}`",
            str(result.request.model["num_hidden_layers"]),
            f"{layout.world_size} GPUs: {layout_text(layout)}",
            str(result.request.rank),
            *peaks,
            f"{planned / GB:.1f}",
            f"{planned / peak - 1:+.1%}",
            f"{result.phase('capture').host_peak / GB:.1f}",
            str(result.phase("update").num_waits),
            f"{sum(phase.seconds for phase in result.phases):.0f} s, {result.host_bytes / GB:.1f} GB",
        )


def table(out: Path) -> str:
    """Markdown of all reports in the folder."""
    found = [
        row
        for name in NAMES
        if (out / name / "rehearsal.json").is_file()
        for row in rows(json.loads((out / name / "rehearsal.json").read_text(encoding="utf-8"))["ranks"], name)
    ]
    rule = ["---" if index < 3 else "---:" for index in range(len(_HEADER))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (_HEADER, rule, *found))


def replace_table(page: str, content: str) -> str:
    """The page with other content between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, mark, after = rest.partition(END)
    assert mark, f"{PAGE} has no line {BEGIN} followed by {END}"
    return f"{before}{BEGIN}\n{content}\n{END}{after}"


def main(out: Path, names: Iterable[str]) -> int:
    """Returns 1 when a run would fail, else 0; the table is written in any case."""
    failed = 0
    for name in names:
        try:
            rehearse_run(RehearseOptions(config=Path(name), out=out / name))
        except RuntimeError as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed = 1
    write_atomically(PAGE, replace_table(PAGE.read_text(encoding="utf-8"), table(out)), durable=False)
    return failed


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:] or NAMES))
