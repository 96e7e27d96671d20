"""CUDA packages that are found and do not import: named once, and hidden from Megatron-Core, which would use half of them, or not start."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from parallel.engine_import import EngineImport, import_engine
from parallel.hidden_packages import OPTIONAL

# What an installation against another torch leaves: the outer package imports, its torch extension does not.
EXTENSION = "raise OSError('libtransformer_engine.so: undefined\\n symbol: _ZN3c10')"
# What SGLang's package of that name says on a machine without a driver. Megatron-Core catches ImportError alone.
WITHOUT_DRIVER = "import ctypes; ctypes.CDLL('libcuda_of_no_machine.so.1')"
PROGRAM = """
import json
from parallel.engine_import import import_engine
from parallel.hidden_packages import hide_unusable
found = import_engine()
import parallel.mcore
from megatron.core.extensions import transformer_engine as of_megatron
from megatron.core.transformer import attention
try:
    import transformer_engine
    later = "imported"
except ImportError:
    later = "refused"
from parallel.capabilities import detect
print(json.dumps([found.version, found.error, found.usable_version, of_megatron.HAVE_TE, later, detect().lines()[2],
    attention.flash_mla_with_kvcache is None, hide_unusable()]))
"""
# What Megatron-Core also tries to import, and what needs no GPU to import, or belongs to parts of it that nothing here imports.
ELSEWHERE = {
    "absl", "boto3", "botocore", "cuda", "cupy", "einops", "flask", "flask_restful", "hypercorn", "msgpack", "multistorageclient",
    "nvidia_resiliency_ext", "nvshmem", "nvtx", "packaging", "psutil", "pynvml", "sentencepiece", "tensorrt_llm", "tiktoken", "tqdm",
    "transformer_engine", "transformer_engine_torch", "transformers", "triton", "wandb", "wget", "yaml", "zmq",
}  # fmt: skip


@pytest.fixture(scope="module")
def half_installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packages")
    (folder / "transformer_engine" / "pytorch").mkdir(parents=True)
    (folder / "transformer_engine" / "__init__.py").write_text("")
    (folder / "transformer_engine" / "pytorch" / "__init__.py").write_text(EXTENSION)
    (folder / "flash_mla").mkdir()
    (folder / "flash_mla" / "__init__.py").write_text(WITHOUT_DRIVER)
    metadata = folder / "transformer_engine-2.20.2.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: transformer-engine\nVersion: 2.20.2\n")
    return folder


def test_packages_that_do_not_import_are_one_line_each_and_unused(half_installed: Path) -> None:
    program = f"import sys; sys.path.insert(0, {str(half_installed)!r})\n{PROGRAM}"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    version, error, usable, megatron_has_it, later, line, no_flash_mla, hidden = json.loads(done.stdout.splitlines()[-1])
    assert (version, usable, megatron_has_it, later) == ("2.20.2", None, False, "refused")
    assert error == "OSError: libtransformer_engine.so: undefined symbol: _ZN3c10"
    assert line.startswith(
        f"TransformerEngine 2.20.2 is installed but does not import ({error}): build it for this torch (make transformer-engine) or"
    )
    assert no_flash_mla is True
    [hidden_line] = hidden
    assert hidden_line.startswith("flash_mla is installed but does not import (OSError: libcuda_of_no_machine.so.1: cannot open shared")


def test_folders_that_pip_leaves_are_no_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "transformer_engine" / "common").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert import_engine.__wrapped__() == EngineImport(version=None, error=None)
        with pytest.raises(ImportError):
            importlib.import_module("transformer_engine")
    finally:
        sys.modules.pop("transformer_engine", None)


def optional_imports(body: list[ast.stmt]) -> Iterator[str]:
    """Top-level packages that a module imports in a `try`, when it is imported itself."""
    for node in body:
        if isinstance(node, ast.Try):
            for inner in ast.walk(node):
                if isinstance(inner, ast.Import):
                    yield from (each.name.partition(".")[0] for each in inner.names)
                elif isinstance(inner, ast.ImportFrom) and inner.level == 0 and inner.module is not None:
                    yield inner.module.partition(".")[0]
        elif isinstance(node, ast.If | ast.With):
            yield from optional_imports(node.body)


def test_every_cuda_package_that_megatron_tries_is_looked_at() -> None:
    spec = importlib.util.find_spec("megatron.core")
    assert spec is not None and spec.submodule_search_locations
    [root] = spec.submodule_search_locations
    tried = {name for path in Path(root).rglob("*.py") for name in optional_imports(ast.parse(path.read_text(encoding="utf-8")).body)}
    assert "flash_mla" in tried
    assert tried - ELSEWHERE - {"torch", "megatron"} - sys.stdlib_module_names == {name.partition(".")[0] for name in OPTIONAL}
