"""`minpro plan`: will a layout fit, and how fast will it be."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_minpro.cluster.training_choice import TrainingChoice
from megatron_minpro.commands.parameters import CONFIG, AsJson, Overrides, takes
from megatron_minpro.option import Option

if TYPE_CHECKING:
    from megatron_minpro.config import RunConfig
    from parallel.planner.hardware import Hardware
    from parallel.planner.plan import Work
    from parallel.planner.shape import ModelShape
    from parallel.planner.training import Training

_PLAIN_SEQUENCE = 4096
_SEARCH_ROWS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """What `minpro plan` is asked for."""

    config: Annotated[Path | None, CONFIG] = None
    overrides: Overrides = ()
    world_size: Annotated[int | None, Option("trainer GPUs; default: the config's")] = None
    hardware: Annotated[str, Option("a name in configs/hardware (h100, h200, b200, b300, gb200, gb300), or a .yaml file")] = "h100"
    model_config: Annotated[Path | None, Option("a Hugging Face config.json; default: model.path's, or shipped sizes")] = None
    training: TrainingChoice = field(default_factory=TrainingChoice)
    mean_tokens: Annotated[int | None, Option("of a response; default: rollout.max_new_tokens", minimum=1)] = None
    lengths: Annotated[
        Path | None, Option("lengths of real responses: a run's rollouts folder, a file of it, or metrics.jsonl (a mean only)")
    ] = None
    colocated: Annotated[bool, Option("rollout servers share the trainer's GPUs")] = False
    global_batch: Annotated[
        int | None,
        Option("plan one plain training step of N sequences, as in published tables, instead of RL", minimum=1),
    ] = None
    sequence_length: Annotated[int | None, Option(f"with --global-batch: tokens of a sequence; default: {_PLAIN_SEQUENCE}", minimum=1)] = (
        None
    )
    micro_batch: Annotated[int | None, Option("with --global-batch: sequences of a micro-batch; default: 1", minimum=1)] = None
    recipe: Annotated[
        str | None,
        Option("with --global-batch: run, train as the configuration says, or fastest, as the fastest published steps; default: run"),
    ] = None
    search: Annotated[bool, Option("all legal layouts of the GPU count, those that fit, fastest first")] = False
    plot: Annotated[Path | None, Option("with --search: the front of memory and throughput as a PNG")] = None
    top: Annotated[int | None, Option(f"with --search: rows to show; default: {_SEARCH_ROWS}", minimum=1)] = None
    calibrate: Annotated[bool, Option("measure this machine's CPU into configs/hardware/cpu.yaml")] = False
    as_json: AsJson = False


@takes(PlanOptions)
def plan(options: PlanOptions) -> None:
    """Predict memory per GPU and time of a layout, before a cluster is spent. Neither weights nor GPUs are needed.

    With --recipe fastest the defaults are those of the fastest published steps: hybridep, overlap, no recomputation, bf16 gradients, whole
    logits; graphs of the full iteration and fp8 attention for mxfp8, partial graphs otherwise. Most layouts were never run like that.

    \b
    Example:
      minpro plan configs/qwen3_30b_a3b.yaml
      minpro plan configs/qwen3_30b_a3b.yaml --lengths runs/qwen3_30b_a3b/rollouts
      minpro plan configs/qwen3_30b_a3b.yaml --world-size 32 --hardware h200 parallel.ep=16 parallel.cp=2
      minpro plan configs/qwen3_235b_a22b.yaml --search --world-size 128 --plot front.png
      minpro plan configs/qwen3_30b_a3b.yaml --world-size 16 parallel.tp=1 parallel.cp=1 parallel.ep=16 \\
          --global-batch 1024 --recipe fastest
      minpro plan --calibrate
    """
    from rich.console import Console

    console = Console(highlight=False)
    if options.calibrate:
        _calibrate(console)
        return
    if options.config is None:
        raise ValueError("CONFIG is missing; expected a run's YAML file, the name of a shipped one, or --calibrate")

    from megatron_minpro.cluster import planning
    from megatron_minpro.cluster.lengths_file import read_lengths
    from parallel.planner import view
    from parallel.planner.hardware import read_hardware
    from parallel.planner.models import read_shape
    from parallel.planner.plan import as_json as plan_as_json
    from parallel.planner.plan import make_plan, remedies
    from parallel.planner.split import as_json as splits_as_json
    from parallel.planner.split import splits

    _check_used(options)
    plain = options.global_batch is not None
    machine = read_hardware(options.hardware)
    run = _configured(options, options.config)
    shape = planning.shape_of(run) if options.model_config is None else read_shape(options.model_config)
    training = planning.training_of(run, machine, options.training, recipe=planning.recipe_of(options.recipe))
    micro_batch = options.micro_batch or 1
    if options.global_batch is None:
        lengths = None if options.lengths is None else read_lengths(options.lengths, longest=run.rollout.max_new_tokens)
        work = planning.reinforcement_work(run, mean_tokens=options.mean_tokens, colocated=options.colocated, lengths=lengths)
    else:
        work = planning.plain_work(options.global_batch, options.sequence_length or _PLAIN_SEQUENCE, micro_batch)
    planning.check_length(shape, work)
    if options.search:
        _search(console, shape, run.world_size, training, machine, work, options)
        return
    if options.global_batch is not None and options.global_batch % (run.layout.dp * micro_batch):
        raise ValueError(
            f"--global-batch: {options.global_batch} sequences are not a multiple of dp * micro-batch = {run.layout.dp} * {micro_batch} = "
            f"{run.layout.dp * micro_batch}"
        )
    result = make_plan(shape, run.layout, training, machine, work)
    others = splits(result)
    if options.as_json:
        typer.echo(json.dumps({**plan_as_json(result), "splits": splits_as_json(others)}, indent=2))
    else:
        console.print(view.describe(result, [] if result.fits else remedies(result), others))
        if not plain:
            console.print(f"minpro rehearse {options.config} runs the code of this layout on fake CUDA tensors, without a GPU", style="dim")


def _check_used(options: PlanOptions) -> None:
    """Raises ValueError for an option that was given though nothing would come of it."""
    from megatron_minpro.cluster.planning import SEARCHED, check_used

    plain = options.global_batch is not None
    check_used(options.search, {"--plot": options.plot, "--top": options.top}, "needs --search")
    check_used(plain, _plain_options(options), "needs --global-batch")
    sampled = {"--mean-tokens": options.mean_tokens, "--lengths": options.lengths, "--colocated": options.colocated or None}
    check_used(not plain, sampled, "is about sampling, of which --global-batch has none")
    check_used(options.lengths is None, {"--mean-tokens": options.mean_tokens}, "says what --lengths says; leave one out")
    if options.search:
        pinned = {text: text for text in options.overrides if text.partition("=")[0] in SEARCHED}
        check_used(False, pinned, "says what --search is to find; leave it out")


def _plain_options(options: PlanOptions) -> dict[str, object | None]:
    return {"--sequence-length": options.sequence_length, "--micro-batch": options.micro_batch, "--recipe": options.recipe}


def _configured(options: PlanOptions, path: Path) -> RunConfig:
    """The file with the overrides, and without what the options say in its place."""
    from megatron_minpro.cluster.planning import SEARCHED
    from megatron_minpro.config import load_config

    assignments = [*options.overrides]
    if options.world_size is not None:
        assignments.append(f"world_size={options.world_size}")
    if options.search:  # the file's own layout need not divide another number of GPUs
        assignments += [f"{key}={value}" for key, value in SEARCHED.items()]
    if options.global_batch is not None:  # it says what a step is, so the mini-batches of the file must not limit the replicas
        assignments.append("actor.updates_per_step=1")
    return load_config(path, assignments)


def _search(
    console: Any, shape: ModelShape, world_size: int, training: Training, machine: Hardware, work: Work, options: PlanOptions
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
    top = options.top or _SEARCH_ROWS
    if options.plot is not None:
        view.plot_front(found, front, options.plot)
    if options.as_json:
        rows = {
            "fitting": [plan_as_json(each) for each in found.fitting[:top]],
            "num_fitting": len(found.fitting),
            "num_failing": len(found.failing),
            "front": [plan_as_json(each) for each in front],
        }
        typer.echo(json.dumps(rows, indent=2))
        return
    console.print(view.describe_search(found, front, top=top))
    if options.plot is not None:
        console.print(f"front: {options.plot}")


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
