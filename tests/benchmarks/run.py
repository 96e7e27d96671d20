"""`make bench`: each number beside a peer or a limit measured in the same run. Prints a table, writes JSON and Markdown.

python tests/benchmarks/run.py --out runs/benchmarks            all of them
python tests/benchmarks/run.py --only scan,logprobs             some of them
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import traceback
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch
from rows import Row, table

from megatron_minpro.tracking.versions import machine_facts

# Files beside this one, each with rows(folder) -> list[Row].
BENCHMARKS = ("scan", "logprobs", "actor", "convert", "grading", "run_state", "overlap", "replay", "client", "growth")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="gets results.json and results.md")
    parser.add_argument("--only", default=",".join(BENCHMARKS), help="names, separated by commas")
    arguments = parser.parse_args()
    chosen = arguments.only.split(",")
    unknown = sorted(set(chosen) - set(BENCHMARKS))
    if unknown:
        parser.error(f"--only: {', '.join(unknown)} is not among {', '.join(BENCHMARKS)}")
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows: list[Row] = []
    failed = []
    for name in chosen:
        print(f"{name}: {datetime.now(UTC):%H:%M:%S} UTC", flush=True)
        try:
            rows += importlib.import_module(name).rows(out)
        except Exception:
            traceback.print_exc()
            failed.append(name)
        write(rows, out)  # after each benchmark: a later failure loses nothing
    print(table(rows))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def write(rows: list[Row], out: Path) -> None:
    """Overwrite results.json and results.md."""
    machine = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine_facts()["cpu"],
        "torch": torch.__version__,
        "threads": 1,
    }
    numbers = [{**asdict(row), "ratio": row.ratio, "bytes_ratio": row.bytes_ratio} for row in rows]
    (out / "results.json").write_text(json.dumps({**machine, "rows": numbers}, indent=2) + "\n")
    (out / "results.md").write_text(table(rows))


if __name__ == "__main__":
    main()
