"""An import hook that rewrites the CUDA literals of megatron.core's sources while they are loaded.

It changes nothing else in the process: torch is not patched, no file is changed.

The rules are textual, so an upgrade of Megatron-Core may leave one without a match; `unmatched_rules` tells and a test asks.
"""

from __future__ import annotations

import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import re
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from parallel.cpu import cuda_stand_in

STAND_IN = "_minpro_cuda"  # the name under which rewritten modules see `cuda_stand_in`


class Rule(NamedTuple):
    pattern: re.Pattern[str]
    replacement: str
    reason: str


RULES = (
    Rule(re.compile(r"from torch\.cuda import"), "from parallel.cpu.cuda_stand_in import", "names imported out of torch.cuda"),
    Rule(re.compile(r"'torch\.cuda\.(Float|Half|BFloat16)Tensor'"), r"'torch.\1Tensor'", "gradients are bucketed by Tensor.type()"),
    Rule(re.compile(r"device=(['\"])cuda(:0)?\1"), 'device="cpu"', "allocations"),
    Rule(re.compile(r"torch\.device\((['\"])cuda\1"), 'torch.device("cpu"', "allocations"),
    Rule(re.compile(r"\.cuda\((non_blocking=True|torch\.cuda\.current_device\(\))?\)"), ".cpu()", "moves"),
    Rule(re.compile(r"\btorch\.cuda\b"), STAND_IN, "everything else of torch.cuda"),
    Rule(re.compile(r", pin_memory=True"), "", "pinned memory needs a CUDA driver"),
    Rule(
        re.compile(r"if torch\.is_tensor\(tensor\) and tensor\.is_cuda:"),
        "if torch.is_tensor(tensor):",
        "all_to_all wants split sizes as a list; Megatron converts them only when they come from a GPU",
    ),
    Rule(re.compile(r"hasattr\(_C, '_cuda_setRNGState'\)"), "False", "the random state is the CPU's"),
    Rule(re.compile(r"(?m)^import triton$"), "from parallel.cpu import triton_stand_in as triton", "kernels that only CUDA tensors reach"),
    Rule(re.compile(r"(?m)^import triton\.language as tl$"), "from parallel.cpu.triton_stand_in import language as tl", "annotations"),
    # torch.compile alone costs 1.5 s of imports in every process, and a C++ compiler where its functions are called.
    Rule(re.compile(r"(?m)^enable_jit_fuser\(\)$"), "disable_jit_fuser()", "compiled fusions are for GPUs"),
)

# Not needed by the actor, and full of CUDA of their own.
UNTOUCHED = (
    "megatron.core.inference",
    "megatron.core.resharding",
    "megatron.core.extensions",
    "megatron.core.distributed.fsdp",
    "megatron.core.export",
)

# Rewritten modules have bytecode files of their own beside Python's, which hold the unchanged ones; other rules, other files.
_TAG = "minpro_" + hashlib.sha256(repr([(rule.pattern.pattern, rule.replacement) for rule in RULES]).encode()).hexdigest()[:16]


def _own_bytecode(path: str) -> str:
    return f"{path.removesuffix('.pyc')}.{_TAG}.pyc" if path.endswith(".pyc") else path


class _RewritingLoader(importlib.machinery.SourceFileLoader):
    def source_to_code(self, data: Any, path: Any, **options: Any) -> types.CodeType:  # type: ignore[override]
        source = bytes(data).decode("utf-8")
        for rule in RULES:
            source = rule.pattern.sub(rule.replacement, source)
        return super().source_to_code(source.encode("utf-8"), path, **options)

    def get_data(self, path: str) -> bytes:
        return super().get_data(_own_bytecode(path))

    def set_data(self, path: str, data: Any, **options: Any) -> None:
        super().set_data(_own_bytecode(path), data, **options)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__dict__[STAND_IN] = cuda_stand_in
        super().exec_module(module)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith("megatron.core") or fullname.startswith(UNTOUCHED):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and type(spec.loader) is importlib.machinery.SourceFileLoader:
            spec.loader = _RewritingLoader(spec.loader.name, spec.loader.path)
        return spec


def unmatched_rules() -> list[Rule]:
    """The rules that match nothing in the installed Megatron-Core: each is either out of date or no longer needed."""
    spec = importlib.util.find_spec("megatron.core")
    assert spec is not None and spec.submodule_search_locations
    root = Path(next(iter(spec.submodule_search_locations)))
    sources = "\n".join(path.read_text(encoding="utf-8") for path in sorted(root.rglob("*.py")))
    return [rule for rule in RULES if not rule.pattern.search(sources)]


def install() -> None:
    """Install the hook. Idempotent.

    Raises RuntimeError when megatron.core was imported earlier: it would then run half rewritten.
    """
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    if "megatron.core" in sys.modules:
        raise RuntimeError("megatron.core was imported before parallel.mcore; import parallel.mcore first")
    sys.meta_path.insert(0, _Finder())
