"""Run by rank_pool.py from test_torch_checkpoint.py: what a rank has imported, and that the rest is imported when it is used.

Argument: the directory that holds the output.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor import _collective_utils as collectives

import megatron_minpro.run.worker
from megatron_minpro.config import load_config
from megatron_minpro.run.process_settings import configure_process

LARGE = ("sympy", "torch._dynamo", "torch._inductor")


def main() -> None:
    config = load_config("configs/tiny_moe_cpu.yaml", [])
    configure_process(config, name=megatron_minpro.run.worker.__name__, log_level="warning", device_type="cpu")
    seen = {"large": [name for name in LARGE if name in sys.modules], "mode": torch.get_deterministic_debug_mode()}
    dist.init_process_group("gloo")
    rows = torch.arange(6.0).view(3, 2)
    spread = distribute_tensor(rows, init_device_mesh("cpu", (2,)), [Shard(0)])
    seen["rows"] = (spread + spread).full_tensor().tolist()
    real = torch.fx.experimental.symbolic_shapes
    seen["module"] = collectives.guard_or_false.__module__
    seen["real"] = collectives.guard_or_false is real.guard_or_false
    (Path(sys.argv[1]) / f"{dist.get_rank()}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


main()
