"""The import hook that lets Megatron-Core run on a CPU: it finds what it rewrites, and touches nothing else."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import parallel.mcore  # noqa: F401  installs the hook
from parallel.cpu import cuda_stand_in, import_hook

ROOT = Path(__file__).resolve().parents[3]


def run_python(program: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, cwd=ROOT, env=environment)


def test_every_rule_still_matches_something_in_the_installed_megatron() -> None:
    assert import_hook.unmatched_rules() == []


def test_a_rule_without_a_match_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    stale = import_hook.RULES[0]._replace(pattern=import_hook.re.compile("never written by anybody"))
    monkeypatch.setattr(import_hook, "RULES", (*import_hook.RULES, stale))
    assert import_hook.unmatched_rules() == [stale]


@pytest.mark.parametrize(
    "name", ["tensor_parallel.random", "distributed.param_and_grad_buffer", "transformer.moe.token_dispatcher", "parallel_state"]
)
def test_a_loaded_module_asks_the_stand_in_and_never_cuda(name: str) -> None:
    spec = importlib.util.find_spec(f"megatron.core.{name}")
    assert spec is not None and spec.origin is not None
    shipped = set(all_names(compile(Path(spec.origin).read_text(encoding="utf-8"), spec.origin, "exec")))
    assert "cuda" in shipped
    loaded = set(all_names(spec.loader.get_code(spec.name)))  # type: ignore[union-attr]
    assert import_hook.STAND_IN in loaded
    assert "cuda" not in loaded


def test_rewritten_bytecode_is_kept_beside_pythons_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    source = tmp_path / "module.py"
    source.write_text("place = torch.device('cuda')\n")
    python = importlib.machinery.SourceFileLoader("module", str(source)).get_code("module")
    code = import_hook._RewritingLoader("module", str(source)).get_code("module")
    assert python is not None and "cuda" in python.co_consts and "cpu" in code.co_consts
    kept = {path.name.count("minpro") for path in (tmp_path / "__pycache__").iterdir()}
    assert kept == {0, 1}
    stat = source.stat()
    source.write_text("spoilt = torch.device('cuda')\n"[: stat.st_size])
    os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    again = import_hook._RewritingLoader("module", str(source)).get_code("module")
    assert again.co_names == code.co_names  # not compiled again: size and time are what they were


def all_names(code: object) -> list[str]:
    found = list(code.co_names)  # type: ignore[attr-defined]
    for constant in code.co_consts:  # type: ignore[attr-defined]
        if hasattr(constant, "co_names"):
            found += all_names(constant)
    return found


def test_no_function_of_megatron_waits_for_a_compiler() -> None:
    from megatron.core.fusions import fused_bias_swiglu

    compiled = [name for name, value in vars(fused_bias_swiglu).items() if hasattr(value, "_torchdynamo_orig_callable")]
    assert callable(fused_bias_swiglu.weighted_swiglu) and compiled == []


def test_torch_itself_is_left_alone() -> None:
    program = """
import torch, torch.cuda, torch.distributed
import torch._dynamo  # wraps torch.manual_seed when it is first imported, which is not our doing
def snapshot():
    places = {"torch": torch, "torch.cuda": torch.cuda, "torch.Tensor": torch.Tensor, "torch.distributed": torch.distributed}
    return {(where, name): id(value) for where, place in places.items() for name, value in vars(place).items() if not name.startswith("__")}
before = snapshot()
import parallel.mcore
after = snapshot()
print(sorted(key for key in before if after.get(key) != before[key]))
print(torch.cuda.is_available(), torch.cuda.__name__, torch.Tensor([1.0]).is_cuda)
"""
    done = run_python(program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[]", f"{torch.cuda.is_available()} torch.cuda False"]


def test_megatron_imported_first_is_refused() -> None:
    done = run_python("import megatron.core\nimport parallel.mcore")
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1] == "RuntimeError: megatron.core was imported before parallel.mcore; import parallel.mcore first"


def test_the_stand_in_answers_what_it_knows_and_passes_the_rest_on() -> None:
    assert cuda_stand_in.current_device() == torch.device("cpu")
    assert (cuda_stand_in.is_available(), cuda_stand_in.device_count()) == (False, 1)
    assert cuda_stand_in.Stream() == cuda_stand_in.current_stream()
    assert cuda_stand_in.get_device_properties is torch.cuda.get_device_properties
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = cuda_stand_in.no_such_name


def test_the_random_state_of_the_stand_in_is_the_cpus() -> None:
    state = cuda_stand_in.get_rng_state()
    first = torch.rand(3)
    cuda_stand_in.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)
    torch.set_rng_state(state)
