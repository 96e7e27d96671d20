"""What `minpro plan` shows: a table of memory, a table of time, a list of layouts, and the front of both as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from checkpoints_convert.atomic_files import write_atomically
from parallel.layout import ParallelLayout
from parallel.planner.memory import GB
from parallel.planner.plan import Plan, batch_of, notes
from parallel.planner.rl import GlobalStep, schedules
from parallel.planner.search import Search

_BAR = 24


def layout_text(layout: ParallelLayout) -> str:
    """E.g. "tp 2, pp 8 (vpp 4), ep 32, dp 16": axes of size 1 are left out, dp always shown."""
    parts = []
    for axis in ("tp", "pp", "cp", "ep", "etp"):
        size = getattr(layout, axis)
        if size > 1:
            parts.append(f"{axis} {size}" + (f" (vpp {layout.vpp})" if axis == "pp" and layout.vpp else ""))
    return ", ".join([*parts, f"dp {layout.dp}"])


def stage_layers(plan: Plan) -> list[int]:
    """Layers of every pipeline rank, over its virtual stages."""
    ranks = (plan.layout.chunks_of_rank(plan.shape.num_layers, rank) for rank in range(plan.layout.pp))
    return [sum(chunk.num_layers for chunk in chunks) for chunks in ranks]


def describe(plan: Plan, remedies: Sequence[tuple[str, Plan]], splits: Sequence[Plan]) -> RenderableType:
    """One plan on one screen. splits: the same GPUs shared otherwise between training and sampling, fastest first."""
    training, batch = plan.training, batch_of(plan.work, plan.layout)
    switches = [training.precision, f"recompute {training.recompute}"]
    if plan.shape.is_moe:
        switches.append(training.dispatcher + (" overlapped" if training.overlap else ""))
    if training.cuda_graphs != "none":
        switches.append(f"{training.cuda_graphs} graphs")
    head = Text()
    head.append(f"{plan.shape.name}", style="bold")
    head.append(
        f" ({plan.shape.total_parameters / 1e9:.1f}B) on {plan.layout.world_size} x {plan.hardware.name}: {layout_text(plan.layout)}\n"
    )
    head.append(
        f"{', '.join(switches)}; {batch.num_micro_batches} micro-batches of {batch.micro_batch_tokens:,} tokens a replica and update"
    )
    stages = stage_layers(plan)
    if len(set(stages)) > 1:
        head.append(f"\nlayers per stage: {', '.join(map(str, stages))}")
    parts: list[RenderableType] = [head, _memory_table(plan), _verdict(plan), _time_table(plan)]
    if plan.global_step is not None:
        parts += [_global_step_line(plan), *_schedule_lines(plan.global_step)]
    if splits:
        parts.append(_split_line(plan, splits[0]))
    for change, other in remedies:
        fits = "fits" if other.fits else "still too much"
        parts.append(
            Text(
                f"  {change}: {other.fullest.total / GB:.1f} GB, {fits}, {other.time.tokens_per_s_per_gpu:,.0f} tokens/s/GPU",
                style="yellow",
            )
        )
    parts += [Text(f"note: {note}", style="dim") for note in notes(plan)]
    return Group(*parts)


def _memory_table(plan: Plan) -> Table:
    unit, name_of_unit = _unit(plan.fullest.total)
    table = Table(title=f"memory per GPU, {name_of_unit}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("part")
    shown = _shown_stages(len(plan.memory))
    for stage in shown:
        table.add_column("" if len(plan.memory) == 1 else f"stage {stage}", justify="right")
    table.add_column("")
    fullest, limit = plan.fullest, plan.hardware.usable_bytes
    for name, value in fullest.parts().items():
        if max(memory.parts()[name] for memory in plan.memory) < 0.05 * unit:
            continue
        cells = [f"{plan.memory[stage].parts()[name] / unit:.1f}" for stage in shown]
        bar = "█" * round(_BAR * value / max(limit, fullest.total))
        table.add_row(name, *cells, Text(bar, style="cyan"), style="bold" if name == fullest.largest else "")
    table.add_section()
    totals = (f"{plan.memory[stage].total / unit:.1f}" for stage in shown)
    table.add_row("total", *totals, Text(f"of {limit / unit:,.1f}"), style="bold")
    return table


def _unit(num_bytes: float) -> tuple[float, str]:
    """Bytes of the unit in which a number is said, and its name."""
    return (GB, "GB") if num_bytes >= GB else (1e6, "MB")


def _shown_stages(count: int) -> list[int]:
    """All of up to six stages; else the first three and the last two."""
    return list(range(count)) if count <= 6 else [0, 1, 2, count - 2, count - 1]


def _verdict(plan: Plan) -> Text:
    memory = plan.fullest
    unit, name_of_unit = _unit(memory.total)
    largest = f"largest part: {memory.largest}, {memory.parts()[memory.largest] / unit:.1f} {name_of_unit}; fullest moment: {memory.moment}"
    if plan.fits:
        return Text(f"fits, {-plan.missing_bytes / GB:.1f} GB to spare; {largest}", style="green")
    return Text(f"does not fit, {plan.missing_bytes / GB:.1f} GB too much; {largest}", style="bold red")


def _time_table(plan: Plan) -> RenderableType:
    time = plan.time
    table = Table(title="time of one optimizer step, s", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_header=False)
    for justify in ("left", "right", "right", "left"):
        table.add_column(justify=justify)
    for name, seconds in sorted(time.parts.items(), key=lambda item: -item[1]):
        share = seconds / time.step_s
        if share >= 0.005:
            table.add_row(name, _seconds(seconds), f"{share:.0%}", Text("█" * round(_BAR * share), style="magenta"))
    table.add_section()
    rates = f"{time.tokens_per_s_per_gpu:,.0f} tokens/s/GPU, {time.tflops_per_gpu:.3g} TFLOP/s/GPU, "
    table.add_row("step", _seconds(time.step_s), style="bold")
    return Group(table, Text(f"{rates}MFU {time.mfu:.1%} of {1e-12 * time.peak_flops:,.4g}", style="bold"))


def _seconds(value: float) -> str:
    return f"{value:,.2f}" if value >= 0.095 else f"{value:.4f}"


def _short(seconds: float) -> str:
    return f"{seconds:,.0f}" if seconds >= 10 else f"{seconds:.2g}"


def _global_step_line(plan: Plan) -> Text:
    step = plan.global_step
    assert step is not None
    assert plan.work.rollouts is not None
    servers = plan.work.rollouts.servers * plan.work.rollouts.tp
    line = Text(
        f"global step {_short(step.step_s)} s at staleness {step.staleness}: sampling {_short(step.sampling.batch_s)} on {servers} GPUs "
        f"({_short(step.sampling.server_s)} on the mean server), "
        f"log-probabilities {_short(step.logprobs_s)}, {plan.work.updates_per_step} updates {_short(step.updates_s)}, weight sync "
        f"{_short(step.sync_s)}"
    )
    line.stylize("bold", 0, len(f"global step {_short(step.step_s)} s"))
    return line


def _schedule_lines(step: GlobalStep) -> list[Text]:
    return [
        Text(
            f"  {schedule}: {_short(step.seconds(schedule))} s; the trainer is idle for {step.trainer_idle(schedule):.0%} of it, "
            f"the servers for {step.servers_idle(schedule):.0%}",
            style="" if schedule == step.schedule else "dim",
        )
        for schedule in schedules(step)
    ]


def _split_line(plan: Plan, best: Plan) -> Text:
    step, rollouts, trainers = best.global_step, best.work.rollouts, best.layout.world_size
    assert step is not None
    assert rollouts is not None
    sampling = rollouts.servers * rollouts.tp
    if trainers == plan.layout.world_size:
        return Text(f"no other split of the {trainers + sampling} GPUs in whole nodes that fits makes the step shorter", style="green")
    return Text(
        f"shortest step with the same GPUs: world_size={trainers} and rollout.servers={rollouts.servers} ({sampling} GPUs): "
        f"{_short(step.step_s)} s; the trainer is idle for {step.trainer_idle(step.schedule):.0%} of it, the servers for "
        f"{step.servers_idle(step.schedule):.0%}",
        style="yellow",
    )


def describe_search(found: Search, front: Sequence[Plan], *, top: int) -> RenderableType:
    """The fastest layouts that fit; a star marks those on the front."""
    first = found.fitting[0]
    where = f"{first.shape.name} on {first.layout.world_size} x {first.hardware.name}"
    title = f"{where}: {len(found.fitting)} layouts fit, {len(found.failing)} do not"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("", "tp", "pp", "vpp", "cp", "ep", "dp", "GB", "step s", "tok/s/GPU", "waits for"):
        table.add_column(name, justify="left" if name in ("", "waits for") else "right", no_wrap=True)
    for plan in found.fitting[:top]:
        layout, time = plan.layout, plan.time
        waits = {name: value for name, value in time.parts.items() if name not in _COMPUTE}
        longest = max(waits, key=lambda name: waits[name])
        axes = [layout.tp, layout.pp, layout.vpp or 1, layout.cp, layout.ep, layout.dp]
        shown = [str(size) if size > 1 else "-" for size in axes]
        shown[1] += _counted(layout)
        table.add_row(
            "*" if plan in front else "",
            *shown,
            f"{plan.fullest.total / GB:.1f}",
            f"{time.step_s:.2f}",
            f"{time.tokens_per_s_per_gpu:,.0f}",
            f"{longest} {waits[longest] / time.step_s:.0%}",
        )
    front_line = f"* on the front of memory and throughput ({len(front)} layouts); of {first.hardware.usable_bytes / GB:.0f} GB"
    marks = {_counted(plan.layout) for plan in found.fitting[:top]} - {""}
    legend = [Text(f"{mark.strip()}: with {_COUNTED[mark]}", style="dim") for mark in _COUNTED if mark in marks]
    return Group(table, Text(front_line, style="dim"), *legend)


# What a layout needs whose stages are even with the embedding, the loss or both counted as layers.
_COUNTED = {
    " e+l": "parallel.count_embedding_as_layer=true parallel.count_loss_as_layer=true",
    " +l": "parallel.count_loss_as_layer=true",
    " +e": "parallel.count_embedding_as_layer=true",
}


def _counted(layout: ParallelLayout) -> str:
    """The key of `_COUNTED`; empty for stages of layers alone."""
    marks = {(True, True): " e+l", (False, True): " +l", (True, False): " +e", (False, False): ""}
    return marks[layout.count_embedding_as_layer, layout.count_loss_as_layer]


_COMPUTE = ("projections", "attention", "experts", "feed-forward", "element-wise", "vocabulary head", "optimizer")


def plot_front(found: Search, front: Sequence[Plan], path: Path) -> None:
    """Throughput against memory of every legal layout, the front joined, the limit of a GPU marked. Writes a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 4.6), dpi=150)
    for plans, colour, label in ((found.failing, "#d4d7dc", "does not fit"), (found.fitting, "#2a5db0", "fits")):
        points = [(plan.fullest.total / GB, plan.time.tokens_per_s_per_gpu) for plan in plans]
        if points:
            memory, rate = zip(*points, strict=True)
            axes.scatter(memory, rate, s=14, color=colour, label=label, linewidths=0)
    axes.plot(
        [plan.fullest.total / GB for plan in front],
        [plan.time.tokens_per_s_per_gpu for plan in front],
        color="#d9722b",
        marker="o",
        markersize=4,
        label="front",
    )
    limit = front[0].hardware.usable_bytes / GB
    axes.axvline(limit, color="#8a8f98", linestyle="--", linewidth=1)
    for plan in (front[0], front[-1]) if len(front) > 1 else front:
        axes.annotate(
            layout_text(plan.layout),
            (plan.fullest.total / GB, plan.time.tokens_per_s_per_gpu),
            xytext=(4, 6),
            textcoords="offset points",
            fontsize=8,
        )
    axes.set_xlim(0, 2.5 * limit)
    axes.set_xlabel(f"GB on the fullest GPU (dashed: {front[0].hardware.name} holds {limit:.0f})")
    axes.set_ylabel("tokens/s/GPU")
    axes.set_title(f"{front[0].shape.name} on {front[0].layout.world_size} {front[0].hardware.name}", loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    image = io.BytesIO()
    figure.savefig(image, format="png", bbox_inches="tight")
    plt.close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, image.getvalue(), durable=False)
