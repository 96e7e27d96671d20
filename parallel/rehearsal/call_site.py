"""Who asked: the innermost line of this project that led to an operator, with Megatron-Core's line between, if any."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType

import torch

_REHEARSAL = str(Path(__file__).parent)
_ROOT = str(Path(__file__).parents[2])
_PACKAGES = tuple(f"{_ROOT}/{name}/" for name in ("parallel", "megatron_minpro", "checkpoints_convert"))
_MEGATRON = "/megatron/core/"
# Inside a backward pass the stack ends at the engine, so the name of the node says more than the line that started the pass.
_current_node = torch._C._current_autograd_node


def call_site() -> str:
    """For people, as in `parallel/layers/experts.py:103 (megatron transformer/moe/moe_utils.py:369)`."""
    megatron: str | None = None
    node = _current_node()
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_PACKAGES) and not name.startswith(_REHEARSAL):
            own = f"{name[len(_ROOT) + 1 :]}:{frame.f_lineno}"
            if node is not None and "_run" in frame.f_code.co_name:
                own = f"backward of {node.name().removesuffix('Backward0').removesuffix('Backward')}"
            return own if megatron is None else f"{own} (megatron {megatron})"
        if megatron is None and _MEGATRON in name:
            megatron = f"{name.split(_MEGATRON)[1]}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside of the project" if megatron is None else f"megatron {megatron}"


def raised_at(error: BaseException) -> str:
    """Where an exception came from: the innermost line of this project, with Megatron-Core's below it, if any."""
    own, megatron = "outside of the project", ""
    traceback = error.__traceback__
    while traceback is not None:
        name = traceback.tb_frame.f_code.co_filename
        if name.startswith(_PACKAGES) and not name.startswith(_REHEARSAL):
            own, megatron = f"{name[len(_ROOT) + 1 :]}:{traceback.tb_lineno}", ""
        elif _MEGATRON in name:
            megatron = f" (megatron {name.split(_MEGATRON)[1]}:{traceback.tb_lineno})"
        traceback = traceback.tb_next
    return own + megatron
