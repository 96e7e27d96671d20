"""`minpro plan`: will a layout fit, and how fast will it be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from megatron_minpro.config import RunConfig
    from parallel.planner.hardware import Hardware
    from parallel.planner.plan import Work
    from parallel.planner.shape import ModelShape
    from parallel.planner.training import Training

_PLAIN_SEQUENCE = 4096


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
    sequence_length: Annotated[int, typer.Option(min=1, help="with --global-batch: tokens of a sequence")] = _PLAIN_SEQUENCE,
    micro_batch: Annotated[int, typer.Option(min=1, help="with --global-batch: sequences of a micro-batch")] = 1,
    search: Annotated[bool, typer.Option("--search", help="all legal layouts of the GPU count, those that fit, fastest first")] = False,
    plot: Annotated[Path | None, typer.Option(help="with --search: the front of memory and throughput as a PNG")] = None,
    top: Annotated[int, typer.Option(min=1, help="with --search: rows to show")] = 12,
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

    from megatron_minpro import plan_view
    from megatron_minpro.config import load_config
    from parallel.planner.hardware import read_hardware
    from parallel.planner.models import find_shape, read_shape
    from parallel.planner.plan import as_json as plan_as_json
    from parallel.planner.plan import make_plan, remedies

    sizes = [] if world_size is None else [f"world_size={world_size}"]
    machine = read_hardware(hardware)
    assignments = [*(overrides or []), *sizes]
    if search:  # the file's own layout need not divide another number of GPUs
        assignments += [f"parallel.{axis}=1" for axis in ("tp", "pp", "cp", "ep", "etp")] + ["parallel.vpp=null", "parallel.dp=null"]
    if global_batch is not None:  # --global-batch says what a step is, so the mini-batches of the file must not limit the replicas
        assignments.append("actor.updates_per_step=1")
    run = load_config(config, assignments)
    if model_config is not None:
        shape = read_shape(model_config)
    else:
        shape = find_shape(run.model.path, architecture=None if run.model.warm_up is None else run.model.warm_up.architecture)
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
    training = _training(run, machine, chosen, plain=global_batch is not None)
    if global_batch is None:
        work = _reinforcement_work(run, mean_tokens=mean_tokens, colocated=colocated)
    else:
        work = _plain_work(global_batch, sequence_length, micro_batch)
    _check_length(shape, work)
    if search:
        _search(console, shape, run.world_size, training, machine, work, plot=plot, top=top, as_json=as_json)
        return
    if global_batch is not None and global_batch % (run.layout.dp * micro_batch):
        raise ValueError(
            f"--global-batch: {global_batch} sequences are not a multiple of dp * micro-batch = {run.layout.dp} * {micro_batch} = "
            f"{run.layout.dp * micro_batch}"
        )
    result = make_plan(shape, run.layout, training, machine, work)
    if as_json:
        typer.echo(json.dumps(plan_as_json(result), indent=2))
    else:
        console.print(plan_view.describe(result, [] if result.fits else remedies(result)))


def _training(run: RunConfig, machine: Hardware, chosen: dict[str, Any], *, plain: bool) -> Training:
    """The config's way of training with what the command line says instead. plain: as published tables train."""
    from megatron_minpro.nearest import nearest
    from parallel.planner.training import CUDA_GRAPHS, DISPATCHERS, PRECISIONS, RECOMPUTES, SPECS, Training

    options = run.megatron
    if chosen["precision"] is None:
        low = "mxfp8" if options.get("fp8_recipe") == "mxfp8" else "fp8"
        chosen["precision"] = low if options.get("fp8") else {"float32": "fp32", "bfloat16": "bf16"}[run.model.dtype]
    if plain:
        graphs = "full" if chosen["precision"] == "mxfp8" else "partial"
        defaults = {
            "dispatcher": "hybridep",
            "overlap": True,
            "recompute": "none",
            "cuda_graphs": graphs,
            "fp8_attention": graphs == "full",
        }
    else:
        flexible = options.get("moe_token_dispatcher_type") == "flex"
        defaults = {
            "dispatcher": options.get("moe_flex_dispatcher_backend", "deepep") if flexible else "alltoall",
            "overlap": bool(options.get("overlap_moe_expert_parallel_comm", False)),
            "recompute": run.actor.recompute,
            "cuda_graphs": "none",
            "fp8_attention": False,
        }
    defaults["spec"] = "local" if machine.measured else "fused"
    chosen = {key: defaults[key] if value is None else value for key, value in chosen.items()}
    known: dict[str, tuple[str, ...]] = {
        "precision": PRECISIONS,
        "dispatcher": DISPATCHERS,
        "recompute": RECOMPUTES,
        "spec": SPECS,
        "cuda_graphs": CUDA_GRAPHS,
    }
    for key, values in known.items():
        if chosen[key] not in values:
            option = {"spec": "layers", "cuda_graphs": "cuda-graphs"}.get(key, key)
            raise ValueError(f"--{option}: {chosen[key]!r} is not known; {nearest(str(chosen[key]), values)}")
    return Training(
        **chosen,
        gradient_bytes=2 if plain and chosen["precision"] != "fp32" else 4,
        chunk_tokens=None if plain else run.actor.logprob_chunk_tokens,
    )


def _reinforcement_work(run: RunConfig, *, mean_tokens: int | None, colocated: bool) -> Work:
    from parallel.planner.plan import Work
    from parallel.planner.rl import Rollouts

    longest = run.rollout.max_new_tokens
    mean = longest if mean_tokens is None else mean_tokens
    if mean > longest:
        raise ValueError(f"--mean-tokens: {mean} is more than rollout.max_new_tokens = {longest}")
    prompt = run.prompts.max_prompt_tokens
    rollouts = Rollouts(
        sequences=run.rollout.prompts_per_step * run.rollout.group_size,
        prompt_tokens=prompt,
        mean_tokens=mean,
        max_tokens=longest,
        servers=run.rollout.servers or len(run.rollout.endpoints),
        tp=run.rollout.tp,
    )
    return Work(
        sequences=run.sequences_per_mini_batch,
        mean_tokens=prompt + mean,
        max_tokens=prompt + longest,
        micro_batch_tokens=run.actor.max_tokens_per_micro_batch,
        updates_per_step=run.actor.updates_per_step,
        staleness=run.staleness,
        rollouts=rollouts,
        colocated=colocated,
    )


def _plain_work(global_batch: int, sequence_length: int, micro_batch: int) -> Work:
    from parallel.planner.plan import Work

    return Work(
        sequences=global_batch,
        mean_tokens=sequence_length,
        max_tokens=sequence_length,
        micro_batch_tokens=sequence_length * micro_batch,
        updates_per_step=1,
        staleness=0,
        rollouts=None,
        colocated=False,
    )


def _check_length(shape: ModelShape, work: Work) -> None:
    if work.rollouts is not None and work.max_tokens > shape.max_positions:
        raise ValueError(
            f"rollout.max_new_tokens: prompts and responses of up to {work.max_tokens} tokens exceed the model's "
            f"{shape.max_positions} positions"
        )


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

    from megatron_minpro import plan_view
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
            f"no layout of {world_size} {machine.name} GPUs fits: the nearest, {plan_view.layout_text(nearest_fit.layout)}, needs "
            f"{memory.total / GB:.1f} GB of {machine.usable_bytes / GB:.1f} GB, {nearest_fit.missing_bytes / GB:.1f} GB too much; "
            f"largest part: {memory.largest} with {memory.parts()[memory.largest] / GB:.1f} GB; "
            f"{f'would fit: {help_text}' if help_text else 'expected more GPUs, or GPUs with more memory'}"
        )
    front = pareto_front(found.fitting)
    if plot is not None:
        plan_view.plot_front(found, front, plot)
    if as_json:
        rows = {
            "fitting": [plan_as_json(each) for each in found.fitting[:top]],
            "num_fitting": len(found.fitting),
            "num_failing": len(found.failing),
            "front": [plan_as_json(each) for each in front],
        }
        typer.echo(json.dumps(rows, indent=2))
        return
    console.print(plan_view.describe_search(found, front, top=top))
    if plot is not None:
        console.print(f"front: {plot}")


def _calibrate(console: Any) -> None:
    from megatron_minpro.atomic_files import write_atomically
    from parallel.planner.calibrate import measure
    from parallel.planner.hardware import FOLDER

    with console.status("measuring this CPU") as status:
        text = measure(progress=lambda what: status.update(f"measuring {what}"))
    path = FOLDER / "cpu.yaml"
    write_atomically(path, text)
    console.print(text.rstrip())
    console.print(f"written to {path}; use it with --hardware cpu")
