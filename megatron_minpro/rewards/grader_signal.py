"""The signal by which the pool has a worker stop the answer that it is at."""

from __future__ import annotations

import signal

# A real-time signal: job schedulers and terminals send none of these.
STOP_SIGNAL = signal.SIGRTMIN + 4
