"""python -m parallel.rehearsal: a JSON list of requests on stdin, one line of JSON per result on stdout, in order.

A line is {"result": ...}, {"phase": text} when a phase begins, or {"refused": text} for a request that cannot be rehearsed. A process of
its own: the device guard must be loaded before torch.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from typing import Any


def main() -> None:
    """Rehearse every request of stdin."""
    from parallel.rehearsal import device_guard

    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # compiled functions would not reach the dispatch mode
    requests = json.load(sys.stdin)
    answers, sys.stdout = sys.stdout, open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, libraries print

    def answer(kind: str, content: Any) -> None:
        print(json.dumps({kind: content}), file=answers, flush=True)

    try:
        device_guard.load()
    except ValueError as error:
        answer("refused", str(error))
        return
    warnings.filterwarnings("ignore")
    from parallel.rehearsal.process import prepare
    from parallel.rehearsal.request import RehearsalRequest

    rehearsal = prepare(lambda phase: answer("phase", phase))
    for values in requests:
        try:
            answer("result", rehearsal.run(RehearsalRequest.from_json(values)).as_json())
        except ValueError as error:
            answer("refused", " ".join(str(error).split()))


if __name__ == "__main__":
    main()
