"""Makes the exports that test_quantize.py looks at, in a process of its own: modelopt changes Megatron and transformers when imported.

python quantize_process.py FOLDER      FOLDER has moe/, dense/ and prompts.jsonl; gets {moe,dense}_fp8/, their reports, moe_nvfp4/
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import torch

from megatron_minpro import cli


def main(folder: Path) -> None:
    for name, field in (("moe", "task.chat"), ("dense", "task.text")):
        prompts = ["--prompts", str(folder / "prompts.jsonl"), "--field", field, "--held-out", "3"]
        with (folder / f"{name}_fp8.json").open("w") as report, contextlib.redirect_stdout(report):
            code = cli.run(["convert", "quantize", str(folder / name), str(folder / f"{name}_fp8"), "--format", "fp8", *prompts, "--json"])
        assert code == 0
    # nvfp4 files can be written on a CPU; only the quantized forward pass, which the command needs too, wants CUDA.
    import modelopt.torch.quantization as quantization
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "moe", dtype=torch.bfloat16)
    token_ids = torch.arange(48).reshape(4, 12)
    model = quantization.quantize(model, quantization.NVFP4_DEFAULT_CFG, lambda wrapped: wrapped(token_ids))
    export_hf_checkpoint(model, dtype=torch.bfloat16, export_dir=folder / "moe_nvfp4")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
