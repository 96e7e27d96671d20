"""mbridge loading a Hugging Face checkpoint into a Megatron model on one rank: prints {"version", "seconds", "peak_bytes"}.

python mbridge_process.py FOLDER      with an interpreter that has mbridge, transformers 4, megatron-core and this project

Without CUDA the model is this project's (local layer spec, one module per expert), as mbridge's own needs TransformerEngine; its
parameters have other names, which mbridge is told. Building the model is not timed.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rows import resident_bytes

from checkpoints_convert.hf_config import read_architecture
from checkpoints_convert.mapping import parameters
from parallel import process_groups
from parallel.capabilities import detect
from parallel.layout import ParallelLayout
from parallel.model import build_model_chunks, transformer_config


def main(folder: Path) -> None:
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29557")
    layout, capabilities, architecture = ParallelLayout(world_size=1), detect(), read_architecture(folder)
    process_groups.initialize(layout, backend="gloo", seed=0, timeout_s=60)
    config = transformer_config(architecture, layout, capabilities, dtype=torch.bfloat16, recompute="none", options={})
    (model,) = build_model_chunks(architecture, layout, config, capabilities)
    model = model.bfloat16()

    import mbridge
    from mbridge.models.qwen3moe import Qwen3MoEBridge
    from transformers import AutoConfig

    hf_names = {parameter.megatron_name: list(parameter.hf_names) for parameter in parameters(architecture)}

    class LocalSpecBridge(Qwen3MoEBridge):  # type: ignore[misc, valid-type]
        def _build_config(self) -> Any:
            return config

        def _weight_name_mapping_mcore_to_hf(self, name: str) -> list[str]:
            return hf_names[name]

        def _weight_to_mcore_format(self, name: str, weights: list[torch.Tensor]) -> torch.Tensor:
            return super()._weight_to_mcore_format(re.sub(r"local_experts\.(\d+)\.(linear_fc\d)\.weight", r"\2.weight\1", name), weights)

    bridge = LocalSpecBridge(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    start = time.perf_counter()
    bridge.load_weights([model], str(folder))
    seconds = time.perf_counter() - start
    peak = resident_bytes("VmHWM")
    print(json.dumps({"version": mbridge.__version__, "seconds": seconds, "peak_bytes": peak}))
    process_groups.shut_down()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
