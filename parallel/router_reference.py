"""Every option of Megatron-Core's router and what becomes of it here: a table in README.md, made from the lists that accept and refuse.

python -m parallel.router_reference
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from checkpoints_convert.atomic_files import write_atomically
from parallel.megatron_options import reason_against
from parallel.model import TRANSFORMER_FIELDS

PAGE = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- router options: make docs -->\n", "<!-- end of router options -->\n"

# option -> what it is without being set, what it may be
ACCEPTED: Mapping[str, tuple[str, str]] = {
    "moe_router_dtype": (
        "`fp32` with 32 experts and more, else `null`",
        "`fp32`, `fp64`; `null`: the model's dtype. In which logits, softmax and gate weights are computed",
    ),
    "moe_router_load_balancing_type": ("`none`", "`seq_aux_loss`, with a coefficient. Other losses depend on how tokens are packed"),
    "moe_aux_loss_coeff": ("`0.0`", "of `seq_aux_loss`, one loss for each sequence (`layers/router.py`)"),
    "moe_router_fusion": (
        "`false`",
        "`true` where TransformerEngine's layers run, not with `actor.routing_replay`: softmax and choice in one kernel",
    ),
    "moe_router_padding_for_quantization": (
        "`false`",
        "`true` where TransformerEngine's layers run: rows of weight 0 fill an expert's block",
    ),
    "moe_router_padding_for_fp8": ("`false`", "the same with `fp8`"),
}
# option -> its value here, and who says so
DECIDED: Mapping[str, tuple[str, str]] = {
    "moe_router_topk": ("`num_experts_per_tok`", "the model"),
    "moe_router_score_function": ("`softmax`", "the model"),
    "moe_router_pre_softmax": ("not `norm_topk_prob`", "the model: softmax over the chosen logits is softmax over all, renormalised"),
    "moe_apply_probs_on_input": ("`false`", "the model weighs an expert's output"),
}
_BESIDE = (  # the router's, under other names
    *("moe_enable_routing_replay", "moe_expert_capacity_factor", "moe_input_jitter_eps", "moe_pad_expert_input_to_capacity"),
    *("moe_token_drop_policy", "moe_token_dropping", "moe_z_loss_coeff"),
)


def router_options() -> list[str]:
    """Names of the installed Megatron-Core's router options, sorted."""
    named = {name for name in TRANSFORMER_FIELDS if name.startswith("moe_router_")}
    return sorted(named | (TRANSFORMER_FIELDS & {*ACCEPTED, *DECIDED, *_BESIDE}))


def render() -> str:
    """The table, Markdown: accepted options, decided ones, refused ones."""
    options = router_options()
    rows = ["| `megatron.` | default | what it may be, or why not |", "|---|---|---|"]
    rows += [f"| `{name}` | {ACCEPTED[name][0]} | {ACCEPTED[name][1]} |" for name in options if name in ACCEPTED]
    rows += [f"| `{name}` | {DECIDED[name][0]} | decided: {DECIDED[name][1]} |" for name in options if name in DECIDED]
    refused = [name for name in options if name not in ACCEPTED and name not in DECIDED]
    rows += [f"| `{name}` | off | refused: {reason_against(name)} |" for name in refused]
    return "\n".join(rows) + "\n"


def replaced(page: str) -> str:
    """The page with the table of today."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{render()}{END}{after}"


if __name__ == "__main__":
    write_atomically(PAGE, replaced(PAGE.read_text(encoding="utf-8")), durable=False)
