"""The planner's memory beside the rehearsal's peak: python -m megatron_minpro.cluster.rehearsal_parity [FOLDER].

Prints a table of all axes, models and recompute settings, writes it to FOLDER with parity.png, and ends with exit code 1 where the plan is
more than 3% above a peak or more than 1% below it. Models have few layers: what differs between layouts is in every layer.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from megatron_minpro.cluster.rehearsing import UPDATE, stage_ranks
from parallel.layout import ParallelLayout
from parallel.optimizer_settings import OptimizerSettings
from parallel.planner.memory import GB
from parallel.planner.models import find_config
from parallel.planner.rehearsed import MOST_ABOVE, MOST_BELOW, Parity, parity
from parallel.planner.view import layout_text
from parallel.rehearsal.launch import rehearse
from parallel.rehearsal.request import RehearsalRequest

_OPTIMIZER = OptimizerSettings(weight_decay=0.01, betas=(0.9, 0.999), eps=1e-8, gradient_clip=1.0)
_OBJECTIVE = {"name": "minpro", "options": {"clip_low": 1.0, "clip_high": 4.0, "aggregation": "token_mean"}}
_TOKENS = 22528  # of a sequence: 2,048 of the prompt, 20,480 of the response
_RECOMPUTES = ("full", "selective", "none")
_MOE_LAYOUTS: tuple[Mapping[str, Any], ...] = (
    {"world_size": 16, "tp": 2, "cp": 4, "ep": 8},
    {"world_size": 16, "ep": 16},
    {"world_size": 16, "cp": 4, "ep": 4},
    {"world_size": 16, "tp": 2, "etp": 2, "ep": 4},
    {"world_size": 16, "tp": 2, "pp": 2, "cp": 2, "ep": 8},
    {"world_size": 16, "pp": 2, "vpp": 2, "cp": 2, "ep": 8},
    {"world_size": 16, "pp": 2, "cp": 2, "ep": 8, "layers_in_first_stage": 3},
)
_DENSE_LAYOUTS: tuple[Mapping[str, Any], ...] = (
    {"world_size": 8, "tp": 4, "cp": 2},
    {"world_size": 8, "cp": 4},
    {"world_size": 8, "tp": 2, "pp": 2, "cp": 2},
)
_MODELS: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    "qwen3_30b_a3b": _MOE_LAYOUTS,
    "qwen3_235b_a22b": ({"world_size": 128, "tp": 4, "cp": 4, "ep": 32},),
    "qwen3_8b": _DENSE_LAYOUTS,
    "qwen3_1.7b": ({"world_size": 8, "pp": 2, "cp": 2}, {"world_size": 8, "tp": 2, "cp": 2}),  # tied
}
_LAYERS = 4


def requests() -> Iterator[RehearsalRequest]:
    """The first rank of every stage, for every model, layout and recompute setting."""
    for name, layouts in _MODELS.items():
        model = {**find_config(name, architecture=None).values, "num_hidden_layers": _LAYERS}
        for axes in layouts:
            layout = ParallelLayout(sequence_parallel=axes.get("tp", 1) > 1, **axes)
            for recompute in _RECOMPUTES:
                yield from (_request(name, model, layout, rank, recompute) for rank in stage_ranks(layout))


def _request(name: str, model: dict[str, Any], layout: ParallelLayout, rank: int, recompute: str) -> RehearsalRequest:
    return RehearsalRequest(
        model=model,
        model_name=name,
        layout=layout,
        rank=rank,
        dtype="bfloat16",
        recompute=recompute,
        max_tokens_per_micro_batch=_TOKENS,
        logprob_chunk_tokens=2048,
        temperature=1.0,
        optimizer=_OPTIMIZER,
        megatron_options={},
        deterministic=False,
        kept_weights="device",
        lengths=(_TOKENS,) * (layout.dp * 2 * layout.pp),
        prompt_tokens=2048,
        update=UPDATE,
        update_options=_OBJECTIVE,
        phases=("build", "load", "keep", "score", "update", "capture", "export"),
    )


def table(found: Sequence[Parity]) -> Table:
    """One line per rank."""
    shown = Table(title="peak memory, planned against rehearsed", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("model", "layout", "stage", "recompute", "phase", "rehearsed GB", "planned GB", "error", "moment"):
        shown.add_column(name, justify="right" if "GB" in name or name == "error" else "left", no_wrap=True)
    for each in found:
        request = each.result.request
        shown.add_row(
            request.model_name,
            layout_text(request.layout),
            str(each.result.stage),
            request.recompute,
            each.result.fullest.name,
            f"{each.result.fullest.peak / GB:.2f}",
            f"{each.planned.total / GB:.2f}",
            f"{each.error:+.2%}",
            each.planned.moment,
            style=None if each.agrees else "red",
        )
    return shown


def plot(found: Sequence[Parity], path: Path) -> None:
    """Planned against rehearsed peaks. Writes a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(5.6, 5.4), dpi=150)
    for name in _MODELS:
        chosen = [each for each in found if each.result.request.model_name == name]
        axes.scatter(
            [each.result.fullest.peak / GB for each in chosen], [each.planned.total / GB for each in chosen], s=22, alpha=0.7, label=name
        )
    ends = [0.9 * min(each.result.fullest.peak for each in found) / GB, 1.1 * max(each.result.fullest.peak for each in found) / GB]
    axes.plot(ends, ends, color="#333333", linewidth=1)
    axes.fill_between(
        ends,
        [(1 - MOST_BELOW) * end for end in ends],
        [(1 + MOST_ABOVE) * end for end in ends],
        color="#8a8f98",
        alpha=0.25,
        label=f"-{MOST_BELOW:.0%} to +{MOST_ABOVE:.0%}",
    )
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel="rehearsed peak, GB", ylabel="planned peak, GB")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def main(arguments: list[str]) -> int:
    """Exit code."""
    folder = Path(arguments[0] if arguments else "runs/rehearsal_parity")
    folder.mkdir(parents=True, exist_ok=True)
    with Console(stderr=True).status("starting") as status:
        found = [parity(result) for result in rehearse(list(requests()), progress=lambda phase: status.update(f"rehearsing {phase}"))]
    errors = [each.error for each in found]
    line = f"{len(found)} ranks: the plan is {min(errors):+.2%} to {max(errors):+.2%} of the rehearsed peak"
    with (folder / "parity.txt").open("w", encoding="utf-8") as file:
        for console in (Console(highlight=False, width=150), Console(file=file, width=150)):
            console.print(table(found), line, sep="\n")
    plot(found, folder / "parity.png")
    print(f"written: {folder / 'parity.txt'}, {folder / 'parity.png'}")
    return 0 if all(each.agrees for each in found) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
