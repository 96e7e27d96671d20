"""Names of the files in a run folder that reports read, beside those of the trackers."""

from __future__ import annotations

CONFIG_FILE = "config.yaml"  # the resolved configuration
RESULT_FILE = "result.json"  # counters of the attempt that ended
VERSIONS_FILE = "versions.jsonl"  # what each attempt ran with
SECONDS_FILE = "seconds.json"  # wall seconds by phase, over all attempts until now
