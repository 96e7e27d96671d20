"""The signal with which the pool stops the answer that a worker compares."""

from __future__ import annotations

import signal

# A real-time signal: job schedulers and terminals send none of these.
STOP_SIGNAL = signal.SIGRTMIN + 4
