"""`minpro plan`: will a layout fit, and how fast will it be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from parallel.planner.hardware import Hardware
    from parallel.planner.plan import Work
    from parallel.planner.shape import ModelShape
    from parallel.planner.training import Training

_PLAIN_SEQUENCE = 4096
_SEARCH_ROWS = 12


def plan(
    config: Annotated[Path | None, typer.Argument(help="the run's YAML file")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value]...", help="settings that differ from the file, as in parallel.ep=16")
    ] = None,
    world_size: Annotated[int | None, typer.Option(help="trainer GPUs; default: the config's")] = None,
    hardware: Annotated[
        str, typer.Option(help="a name in configs/hardware (h100, h200, b200, b300, gb200, gb300), or a .yaml file")
    ] = "h100",
    model_config: Annotated[Path | None, typer.Option(help="a Hugging Face config.json; default: model.path's, or shipped sizes")] = None,
    precision: Annotated[str | None, typer.Option(help="bf16, fp8, mxfp8 or fp32; default: the config's")] = None,
    dispatcher: Annotated[str | None, typer.Option(help="alltoall, deepep or hybridep; default: the config's")] = None,
    overlap: Annotated[
        bool | None, typer.Option("--overlap/--no-overlap", help="hide dispatch behind another micro-batch; default: the config's")
    ] = None,
    recompute: Annotated[str | None, typer.Option(help="none, selective or full; default: actor.recompute")] = None,
    layers: Annotated[
        str | None, typer.Option(help="fused: TransformerEngine's; local: this project's own. Default: fused on GPUs")
    ] = None,
    cuda_graphs: Annotated[str | None, typer.Option(help="none, partial (per layer) or full (iteration); default: none")] = None,
    fp8_attention: Annotated[
        bool | None, typer.Option("--fp8-attention/--bf16-attention", help="precision of attention's core; default: bf16")
    ] = None,
    fsdp: Annotated[bool, typer.Option("--fsdp", help="parameters and gradients sharded over replicas too")] = False,
    imbalance: Annotated[float, typer.Option(min=1.0, help="tokens of the busiest expert-parallel rank over the mean")] = 1.0,
    release: Annotated[float, typer.Option(min=24.0, help="of the training stack, year.month; older ones launch more kernels")] = 26.06,
    mean_tokens: Annotated[int | None, typer.Option(min=1, help="of a response; default: rollout.max_new_tokens")] = None,
    colocated: Annotated[bool, typer.Option("--colocated", help="rollout servers share the trainer's GPUs")] = False,
    global_batch: Annotated[
        int | None,
        typer.Option(min=1, help="plan one plain training step of so many sequences, as published tables train, in place of RL"),
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(min=1, help=f"with --global-batch: tokens of a sequence; default: {_PLAIN_SEQUENCE}")
    ] = None,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="with --global-batch: sequences of a micro-batch; default: 1")] = None,
    search: Annotated[bool, typer.Option("--search", help="all legal layouts of the GPU count, those that fit, fastest first")] = False,
    plot: Annotated[Path | None, typer.Option(help="with --search: the front of memory and throughput as a PNG")] = None,
    top: Annotated[int | None, typer.Option(min=1, help=f"with --search: rows to show; default: {_SEARCH_ROWS}")] = None,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="measure this machine's CPU into configs/hardware/cpu.yaml")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON for programs")] = False,
) -> None:
    """Predict memory per GPU and time of a layout, before a cluster is spent. Neither weights nor GPUs are needed.

    With --global-batch the defaults are those of the fastest published recipes: hybridep, overlap, no recomputation, bf16 gradients,
    whole logits; graphs of the full iteration and fp8 attention for mxfp8, partial graphs otherwise.

    \b
    Example:
      minpro plan configs/qwen3_30b_a3b.yaml
      minpro plan configs/qwen3_30b_a3b.yaml --world-size 32 --hardware h200 parallel.ep=16 parallel.cp=2
      minpro plan configs/qwen3_235b_a22b.yaml --search --world-size 128 --plot front.png
      minpro plan configs/qwen3_30b_a3b.yaml --world-size 16 parallel.tp=1 parallel.cp=1 parallel.ep=16 \\
          --global-batch 1024
      minpro plan --calibrate
    """
    from rich.console import Console

    console = Console(highlight=False)
    if calibrate:
        _calibrate(console)
        return
    if config is None:
        raise ValueError("CONFIG is missing; expected a run's YAML file, or --calibrate")

    from megatron_minpro.cluster import planning
    from parallel.planner import view

    planning.check_used(search, {"--plot": plot, "--top": top}, "needs --search")
    planning.check_used(
        global_batch is not None, {"--sequence-length": sequence_length, "--micro-batch": micro_batch}, "needs --global-batch"
    )
    sampled = {"--mean-tokens": mean_tokens, "--colocated": colocated or None}
    planning.check_used(global_batch is None, sampled, "is about sampling, of which --global-batch has none")
    if search:
        pinned = {text: text for text in overrides or [] if text.partition("=")[0] in planning.SEARCHED}
        planning.check_used(False, pinned, "says what --search is to find; leave it out")
    from megatron_minpro.config import load_config
    from parallel.planner.hardware import read_hardware
    from parallel.planner.models import read_shape
    from parallel.planner.plan import as_json as plan_as_json
    from parallel.planner.plan import make_plan, remedies

    sizes = [] if world_size is None else [f"world_size={world_size}"]
    machine = read_hardware(hardware)
    assignments = [*(overrides or []), *sizes]
    if search:  # the file's own layout need not divide another number of GPUs
        assignments += [f"{key}={value}" for key, value in planning.SEARCHED.items()]
    if global_batch is not None:  # --global-batch says what a step is, so the mini-batches of the file must not limit the replicas
        assignments.append("actor.updates_per_step=1")
    run = load_config(config, assignments)
    shape = planning.shape_of(run) if model_config is None else read_shape(model_config)
    chosen = {
        "precision": precision,
        "dispatcher": dispatcher,
        "overlap": overlap,
        "recompute": recompute,
        "spec": layers,
        "cuda_graphs": cuda_graphs,
        "fp8_attention": fp8_attention,
        "fsdp": fsdp,
        "imbalance": imbalance,
        "release": release,
    }
    training = planning.training_of(run, machine, chosen, plain=global_batch is not None)
    if global_batch is None:
        work = planning.reinforcement_work(run, mean_tokens=mean_tokens, colocated=colocated)
    else:
        sequences = 1 if micro_batch is None else micro_batch
        work = planning.plain_work(global_batch, _PLAIN_SEQUENCE if sequence_length is None else sequence_length, sequences)
    planning.check_length(shape, work)
    if search:
        _search(
            console, shape, run.world_size, training, machine, work, plot=plot, top=_SEARCH_ROWS if top is None else top, as_json=as_json
        )
        return
    if global_batch is not None and global_batch % (run.layout.dp * sequences):
        raise ValueError(
            f"--global-batch: {global_batch} sequences are not a multiple of dp * micro-batch = {run.layout.dp} * {sequences} = "
            f"{run.layout.dp * sequences}"
        )
    result = make_plan(shape, run.layout, training, machine, work)
    if as_json:
        typer.echo(json.dumps(plan_as_json(result), indent=2))
    else:
        console.print(view.describe(result, [] if result.fits else remedies(result)))


def _search(
    console: Any,
    shape: ModelShape,
    world_size: int,
    training: Training,
    machine: Hardware,
    work: Work,
    *,
    plot: Path | None,
    top: int,
    as_json: bool,
) -> None:
    from rich.console import Console

    from parallel.planner import view
    from parallel.planner.memory import GB
    from parallel.planner.plan import as_json as plan_as_json
    from parallel.planner.plan import remedies
    from parallel.planner.search import pareto_front
    from parallel.planner.search import search as search_layouts

    with Console(stderr=True, highlight=False).status("planning layouts") as status:
        found = search_layouts(
            shape, world_size, training, machine, work, progress=lambda count: status.update(f"planning layouts: {count}")
        )
    if not found.fitting:
        nearest_fit = found.failing[0]
        memory = nearest_fit.fullest
        help_text = "; ".join(change for change, other in remedies(nearest_fit) if other.fits)
        raise ValueError(
            f"no layout of {world_size} {machine.name} GPUs fits: the nearest, {view.layout_text(nearest_fit.layout)}, needs "
            f"{memory.total / GB:.1f} GB of {machine.usable_bytes / GB:.1f} GB, {nearest_fit.missing_bytes / GB:.1f} GB too much; "
            f"largest part: {memory.largest} with {memory.parts()[memory.largest] / GB:.1f} GB; "
            f"{f'would fit: {help_text}' if help_text else 'expected more GPUs, or GPUs with more memory'}"
        )
    front = pareto_front(found.fitting)
    if plot is not None:
        view.plot_front(found, front, plot)
    if as_json:
        rows = {
            "fitting": [plan_as_json(each) for each in found.fitting[:top]],
            "num_fitting": len(found.fitting),
            "num_failing": len(found.failing),
            "front": [plan_as_json(each) for each in front],
        }
        typer.echo(json.dumps(rows, indent=2))
        return
    console.print(view.describe_search(found, front, top=top))
    if plot is not None:
        console.print(f"front: {plot}")


def _calibrate(console: Any) -> None:
    from checkpoints_convert.atomic_files import write_atomically
    from parallel.planner.calibrate import measure
    from parallel.planner.hardware import FOLDER

    with console.status("measuring this CPU") as status:
        text = measure(progress=lambda what: status.update(f"measuring {what}"))
    path = FOLDER / "cpu.yaml"
    write_atomically(path, text)
    console.print(text.rstrip())
    console.print(f"written to {path}; use it with --hardware cpu")
