"""Server arguments that returned experts cannot stand are refused by name; what is refused still stands in SGLang's sources."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from rollout.sglang.environment import default_server_python
from rollout.sglang.route_limits import check_route_limits
from rollout.sglang.server import ServerSettings, server_command


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"chunked_prefill_size": -1}, r"^sglang\.chunked_prefill_size = -1: .* expected a positive number$"),
        ({"chunked-prefill-size": "-1"}, r"^sglang\.chunked-prefill-size = '-1'"),
        ({"enable_hierarchical_cache": True}, r"^sglang\.enable_hierarchical_cache = True: .* second cache; expected false$"),
        ({"enable_lmcache": True}, r"^sglang\.enable_lmcache = True"),
        ({"speculative_algorithm": "EAGLE3"}, r"^sglang\.speculative_algorithm = 'EAGLE3': .* drafted tokens"),
        ({"disaggregation_mode": "decode"}, r"^sglang\.disaggregation_mode = 'decode': .* expected null$"),
        ({"enable_two_batch_overlap": True}, r"^sglang\.enable_two_batch_overlap = True: both halves"),
        ({"moe_runner_backend": "flashinfer_trtllm"}, r"^sglang\.moe_runner_backend = 'flashinfer_trtllm': .* expected triton$"),
        ({"moe_runner_backend": "auto"}, r"^sglang\.moe_runner_backend = 'auto': .* expected triton$"),
        ({"enable_return_routed_experts": False}, r"^sglang\.enable_return_routed_experts = False: expected true"),
    ],
)
def test_what_returned_experts_cannot_stand_is_refused_by_name(
    options: dict[str, Any], words: str, server_settings: ServerSettings
) -> None:
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(server_settings, return_routes=True, options=options)
    dataclasses.replace(server_settings, return_routes=False, options=options)


def test_values_that_change_nothing_are_accepted() -> None:
    check_route_limits({"chunked_prefill_size": 512, "enable_lmcache": False, "disaggregation_mode": "null", "mem_fraction_static": 0.8})
    check_route_limits({"moe-runner-backend": "triton", "enable_return_routed_experts": True})


def test_servers_are_told_and_on_gpus_get_a_runner_that_asks_the_router(server_settings: ServerSettings) -> None:
    def command(*, return_routes: bool = False, **changes: Any) -> list[str]:
        settings = dataclasses.replace(server_settings, return_routes=return_routes, **changes)
        return server_command(settings, port=1, index=0, option_arguments=[], key_file=None)

    told = command(device="cuda", return_routes=True)
    assert "--enable-return-routed-experts" in told and told[told.index("--moe-runner-backend") + 1] == "triton"
    assert "--enable-return-routed-experts" in command(return_routes=True)
    assert not {"--enable-return-routed-experts", "--moe-runner-backend"} & {*command(), *command(device="cuda")}


def test_the_installed_sglang_has_the_limits_that_are_refused() -> None:
    [site_packages] = (default_server_python().parent.parent / "lib").glob("python3.*/site-packages")
    sources = {
        name: (site_packages / "sglang/srt" / name).read_text() for name in ("state_capturer/routed_experts.py", "state_capturer/base.py")
    }
    capturer, buffer = sources.values()
    assert "get_schedule().chunked_prefill_size * get_parallel().num_dp_ranks" in capturer
    assert "num_verify_tokens is still not accounted for" in capturer
    assert "self.buffer[:batch, layer_id, :] = topk_indices" in buffer  # from the first place on, whichever half it is
    assert "self.host_cache.buffer[cache_pool_idx]" in buffer and "offload" not in buffer
    topk = (site_packages / "sglang/srt/layers/moe/topk.py").read_text()
    assert "return TritonKernelTopKOutput(" in topk and "return BypassedTopKOutput(" in topk
