"""Server arguments that the weight endpoints cannot honour are refused by name; what is refused still stands in SGLang's sources."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from rollout.sglang.environment import default_server_python
from rollout.sglang.server import check_options
from rollout.sglang.weight_limits import check_weight_limits


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dp_size": 2}, r"^sglang\.dp_size: 2: .* one replica; expected 1"),
        ({"data-parallel-size": "2"}, r"^sglang\.data-parallel-size: '2': .* one replica"),
        ({"dp_size": 2, "enable_dp_attention": False}, r"^sglang\.dp_size: 2"),
        ({"pp_size": 2}, r"^sglang\.pp_size: 2: .* expected 1, and a larger rollout\.tp"),
        ({"pipeline_parallel_size": 4}, r"^sglang\.pipeline_parallel_size: 4"),
        ({"nnodes": 2}, r"^sglang\.nnodes: 2"),
        ({"tokenizer_worker_num": 4}, r"^sglang\.tokenizer_worker_num: 4"),
        ({"weight_cache_mode": "client"}, r"^sglang\.weight_cache_mode: 'client'"),
        ({"enable_symm_mem": True}, r"^sglang\.enable_symm_mem: True: .* NCCL_CUMEM_ENABLE"),
        ({"enable-nccl-nvls": True}, r"^sglang\.enable-nccl-nvls: True: .* NCCL_NVLS_ENABLE"),
    ],
)
def test_what_the_weight_endpoints_cannot_honour_is_refused_by_name(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_options(options, device="cuda")  # at once: SGLang is not asked


def test_values_that_change_nothing_are_accepted() -> None:
    check_weight_limits({"dp_size": 1, "pp-size": "1", "weight_cache_mode": "off", "enable_symm_mem": False, "mem_fraction_static": 0.8})
    check_weight_limits({"dp_size": 2, "enable_dp_attention": True})  # groups of attention inside one replica


def functions(path: Path) -> dict[str, str]:
    """Source of every function of a file of the installed SGLang, by name."""
    [site_packages] = (default_server_python().parent.parent / "lib").glob("python3.*/site-packages")
    text = (site_packages / "sglang/srt" / path).read_text()
    tree = ast.parse(text)
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name: ast.unparse(node) for node in ast.walk(tree) if isinstance(node, kinds)}


def test_the_installed_sglang_has_the_limits_that_are_refused() -> None:
    endpoints = functions(Path("managers/tokenizer_control_mixin.py"))
    for name in ("init_weights_update_group", "destroy_weights_update_group", "update_weights_from_distributed"):
        assert "assert get_parallel().dp_size == 1" in endpoints[name]
    updater = functions(Path("model_executor/model_runner_components/weight_updater.py"))
    assert "rank = rank_offset + self.tp_rank\n" in updater["init_weights_update_group"]  # no pipeline stage in it
    assert "weight_cache_mode" in updater["_assert_weight_cache_inactive"]
    for name in ("load_weights_from_distributed", "update_weights_from_disk"):
        assert "self._assert_weight_cache_inactive(" in updater[name]
    variables = functions(Path("entrypoints/engine.py"))["_set_envs_and_config"]
    assert "'NCCL_CUMEM_ENABLE' not in os.environ or cfg.enable_symm_mem" in variables
    assert "cfg.enable_nccl_nvls" in variables
    assert "self.record_config_updates" in endpoints["_update_weight_version_if_provided"]  # in this process alone
