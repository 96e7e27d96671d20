"""SGLang's own server on a machine without a GPU: `python -m rollout.sglang.cpu --model-path FOLDER --device cpu ...`.

`install` is the one entry for programs that import SGLang themselves; the modules are private to this folder.
"""

from __future__ import annotations

import os


def install() -> None:
    """Patch SGLang for a CPU where SGLANG_USE_CPU_ENGINE=1 is set; change nothing elsewhere. Call it before SGLang is imported."""
    if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
        from rollout.sglang.cpu import patches

        patches.apply()
