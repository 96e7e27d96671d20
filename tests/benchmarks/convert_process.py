"""One `minpro convert`, timed without its imports: prints {"seconds", "cpu_seconds", "peak_bytes"} as the last line.

python convert_process.py hf-to-megatron SRC DST ...
"""

from __future__ import annotations

import json
import sys
import time

import torch.distributed.checkpoint.filesystem  # noqa: F401 - two seconds, whatever the size of the model
from rows import resident_bytes

from megatron_minpro import cli


def main() -> None:
    start, cpu_start = time.perf_counter(), time.process_time()
    code = cli.run(["convert", *sys.argv[1:]])
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    if code:
        sys.exit(code)
    peak_bytes = resident_bytes("VmHWM")
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": peak_bytes}))


if __name__ == "__main__":
    main()
