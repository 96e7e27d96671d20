"""`make bench`: each number beside a peer or a limit measured in the same run. Prints a table, writes JSON and Markdown.

python tests/benchmarks/run.py --out runs/benchmarks
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from megatron_minpro.trainer import make_loss_function


@dataclass(frozen=True, kw_only=True)
class Row:
    """seconds: median of our runs. peer_seconds: of what it is compared with. target: largest ratio that is good enough."""

    name: str
    seconds: float
    peer: str
    peer_seconds: float
    target: float

    @property
    def ratio(self) -> float:
        return self.seconds / self.peer_seconds


def median_seconds(function: Callable[[], object], *, repeats: int) -> float:
    """Median wall seconds after one run that warms up."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def scan_against_cummin() -> Row:
    """The exclusive prefix minimum of 8 packed sequences of 32,768 tokens against one torch.cummin over the same numbers."""
    from parallel.prefix_scan import PrefixMin, scan
    from parallel.sequence_shard import SequenceShard

    shard = SequenceShard.whole([32_768] * 8)
    x_T = torch.randn(shard.num_local_tokens)
    mask_T = torch.rand(shard.num_local_tokens) < 0.9
    return Row(
        name="local prefix-min scan, 262,144 tokens",
        seconds=median_seconds(lambda: scan(shard, [PrefixMin(x_T, mask_T)]), repeats=30),
        peer="torch.cummin",
        peer_seconds=median_seconds(lambda: torch.cummin(x_T, 0), repeats=30),
        target=3.0,
    )


def logprobs_against_products() -> Row:
    """The chunked log-prob head, forward and backward, against the four matrix products that it must do."""
    from parallel.logprobs import token_logprobs

    tokens, hidden_size, vocab_size = 1024, 256, 32_768
    hidden = torch.randn(tokens, hidden_size, requires_grad=True)
    weight = torch.randn(vocab_size, hidden_size, requires_grad=True)
    labels = torch.randint(0, vocab_size, (tokens,))
    grad = torch.randn(tokens, vocab_size)

    def ours() -> None:
        logprobs, _ = token_logprobs(
            hidden, weight, labels, vocab_size=vocab_size, temperature=1.0, tp_group=None, chunk_tokens=256, with_entropy=False
        )
        logprobs.sum().backward()

    def products() -> None:
        with torch.no_grad():
            hidden @ weight.T
            hidden @ weight.T
            grad @ weight
            grad.T @ hidden

    return Row(
        name=f"log-prob head, {tokens:,} x {hidden_size} x {vocab_size:,}, forward and backward",
        seconds=median_seconds(ours, repeats=5),
        peer="its four matrix products",
        peer_seconds=median_seconds(products, repeats=5),
        target=1.25,
    )


def actor_against_transformers(folder: Path) -> Row:
    """Forward and backward of 16 packed sequences of 128 tokens: the actor's update against transformers with eager experts."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from checkpoints_convert.hf_config import read_architecture
    from checkpoints_convert.safetensors_io import SafetensorsReader
    from megatron_minpro.objectives import make_objective
    from parallel import process_groups
    from parallel.actor import ActorSettings, MegatronActor
    from parallel.capabilities import detect
    from parallel.layout import ParallelLayout
    from parallel.optimizer import OptimizerSettings
    from parallel.packing import TokenSequence

    config = Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        use_cache=False,
    )
    model = Qwen3MoeForCausalLM(config).float()
    model.save_pretrained(folder)
    token_ids = torch.randint(0, 512, (16, 129))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def theirs() -> None:
        optimizer.zero_grad()
        logits = model(token_ids[:, :-1]).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), token_ids[:, 1:].flatten()).backward()
        optimizer.step()

    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29555")
    layout = ParallelLayout(world_size=1)
    groups = process_groups.initialize(layout, backend="gloo", seed=0, timeout_s=60)
    settings = ActorSettings(
        dtype=torch.float32,
        recompute="none",
        max_tokens_per_micro_batch=4096,
        logprob_chunk_tokens=4096,
        temperature=1.0,
        optimizer=OptimizerSettings(weight_decay=0.01, betas=(0.9, 0.999), eps=1e-8, gradient_clip=1.0),
        megatron_options={},
    )
    actor = MegatronActor(read_architecture(folder), layout, groups, detect(), settings)
    with SafetensorsReader(folder) as reader:
        actor.load_hugging_face(reader.read)
    stream = {"behaviour_logprobs": torch.full((128,), -6.0), "advantages": torch.ones(128)}
    sequences = [TokenSequence(token_ids=row, loss_mask=torch.ones(128, dtype=torch.bool), streams=stream) for row in token_ids]
    loss_fn = make_loss_function(make_objective("minpro"))
    row = Row(
        name="actor update (MinPRO, entropy, metrics), 2,048 tokens, 4 layers of 128, 8 experts",
        seconds=median_seconds(lambda: actor.update(sequences, loss_fn, learning_rate=1e-4), repeats=10),
        peer="transformers forward, cross-entropy, backward, AdamW",
        peer_seconds=median_seconds(theirs, repeats=10),
        target=1.0,
    )
    process_groups.shut_down()
    return row


def table(rows: list[Row]) -> str:
    """A Markdown table."""
    lines = ["| what | ms | against | ms | ratio | target |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {row.name} | {1e3 * row.seconds:.2f} | {row.peer} | {1e3 * row.peer_seconds:.2f} | {row.ratio:.2f} | {row.target:.2f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="gets results.json and results.md")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows = [scan_against_cummin(), logprobs_against_products(), actor_against_transformers(out / "model")]
    machine = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": platform.processor(),
        "torch": torch.__version__,
        "threads": 1,
    }
    (out / "results.json").write_text(
        json.dumps({**machine, "rows": [{**asdict(row), "ratio": row.ratio} for row in rows]}, indent=2) + "\n"
    )
    (out / "results.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
