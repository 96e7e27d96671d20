"""`minpro scale`: how training scales with expert parallelism, predicted and measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from megatron_minpro.commands.parameters import Config, Overrides, takes
from megatron_minpro.option import Option

if TYPE_CHECKING:
    from megatron_minpro.config import RunConfig
    from megatron_minpro.scaling.measure import Nodes
    from megatron_minpro.scaling.routing import RoutingCost
    from megatron_minpro.scaling.study import Case, Settings
    from parallel.planner.hardware import Hardware
    from parallel.planner.plan import Work
    from parallel.planner.shape import ModelShape
    from parallel.planner.training import Training

_FINISHED = ("ok", "illegal", "out_of_memory")  # a failure may pass: it is measured again


def _sizes_of(option: str) -> Callable[[str], tuple[int, ...]]:
    """Reads whole numbers with commas between them, as in 1,2,4. Raises ValueError naming the option."""

    def read(text: str) -> tuple[int, ...]:
        try:
            sizes = tuple(int(part) for part in text.split(",") if part.strip())
        except ValueError:
            sizes = (0,)
        if any(size < 1 for size in sizes):
            raise ValueError(f"{option}: {text!r}, expected whole numbers with commas between them, as in 1,2,4")
        return sizes

    return read


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleOptions:
    """What `minpro scale` is asked for."""

    config: Config
    overrides: Overrides = ()
    ep: Annotated[tuple[int, ...], Option("sizes of expert parallelism, as in 1,2,4,8", given=str, read=_sizes_of("--ep"))] = ()
    predict: Annotated[bool, Option("by the planner: needs no GPU and no weights")] = False
    measure: Annotated[bool, Option("by real optimizer steps, one group of processes per layout")] = False
    report: Annotated[bool, Option("tables and plots of what was measured before")] = False
    routing_study: Annotated[
        int, Option("measure the checkpoint's expert choices on N real texts, and their cost at each ep", minimum=0)
    ] = 0
    out: Annotated[Path | None, Option("the study's folder, continued if there; default: OUTPUT_DIR/scale_NAME")] = None
    world_size: Annotated[
        tuple[int, ...],
        Option("ranks, as in 16,32; default: for each ep the fewest that hold it", given=str, read=_sizes_of("--world-size")),
    ] = ()
    scaling: Annotated[Literal["both", "strong", "weak"], Option("strong: the step's sequences stay; weak: they grow with the ranks")] = (
        "both"
    )
    routing: Annotated[
        Literal["real", "forced"],
        Option("real: the model's routers choose experts; forced: Megatron-Core's random, so balanced choice"),
    ] = "real"
    sequences: Annotated[int | None, Option("of a step, on the fewest ranks; default: the config's", minimum=1)] = None
    mean_tokens: Annotated[int | None, Option("of a response; default: rollout.max_new_tokens", minimum=1)] = None
    hardware: Annotated[
        str | None, Option("a name in configs/hardware or a .yaml file; default: h100 to predict, this machine's to measure")
    ] = None
    imbalance: Annotated[float, Option("of predictions: tokens of the busiest expert-parallel rank over the mean", minimum=1.0)] = 1.0
    warm_up: Annotated[int, Option("optimizer steps before the measured window", minimum=1)] = 3
    steps: Annotated[int, Option("optimizer steps in the measured window", minimum=1)] = 10
    timeout_s: Annotated[float, Option("a layout that takes longer is recorded as failed")] = 1800.0
    row: Annotated[int | None, Option("measure this layout of the list alone, as a job array's task does", minimum=0)] = None
    nodes: Annotated[int, Option("machines that run this command together; needs --row", minimum=1)] = 1
    node_rank: Annotated[int, Option("which of them this is", minimum=0)] = 0
    master_address: Annotated[str, Option("of the first of them")] = "127.0.0.1"
    master_port: Annotated[int, Option("free on the first of them")] = 29400
    dry_run: Annotated[bool, Option("list the layouts that would be studied, start and write nothing")] = False


@takes(ScaleOptions)
def scale(options: ScaleOptions) -> None:
    """Study how training scales with expert parallelism: rows.jsonl, rows.csv, report.md and plots in one folder.

    Layouts that cannot run, run out of memory or fail become rows with their reason. The same command continues an interrupted study.

    \b
    Example:
      minpro scale configs/tiny_moe_cpu.yaml --ep 1,2,4 --measure
      minpro scale configs/qwen3_30b_a3b.yaml --ep 1,2,4,8,16 --predict --hardware h200 parallel.tp=1 parallel.cp=1
      minpro scale configs/tiny_moe_cpu.yaml --ep 1,2,4,8 --predict --hardware cpu --routing-study 64
    """
    if not (options.predict or options.measure or options.report or options.routing_study):
        raise ValueError("minpro scale: expected --predict, --measure, --routing-study or --report")
    if options.nodes > 1 and options.row is None:
        raise ValueError("--nodes: several machines measure one layout at a time; expected --row beside it")
    if not options.ep:
        raise ValueError("--ep: missing; expected sizes of expert parallelism, as in 1,2,4,8")

    from megatron_minpro.cluster import planning
    from megatron_minpro.cluster.training_choice import TrainingChoice
    from megatron_minpro.config import load_config
    from megatron_minpro.scaling.measure import Nodes
    from megatron_minpro.scaling.study import SCALINGS, Settings, make_cases, open_study
    from parallel.capabilities import detect
    from parallel.planner.hardware import hardware_of_device, read_hardware

    run = load_config(options.config, options.overrides)
    capabilities = detect()
    hardware = options.hardware or (hardware_of_device(capabilities.device_name) if options.measure else "h100")
    machine = read_hardware(hardware)
    folder = Path(run.output_dir) / f"scale_{run.name}" if options.out is None else options.out
    training = planning.training_of(run, machine, TrainingChoice(imbalance=options.imbalance))
    work = planning.reinforcement_work(run, mean_tokens=options.mean_tokens, colocated=False)
    shape = planning.shape_of(run)
    planning.check_length(shape, work)
    # Of one optimizer step alone, its sequences all of one length: what is measured.
    length = int(work.mean_tokens)
    work = replace(work, max_tokens=length, rollouts=None, keeps_weights=False)
    settings = Settings(
        routing=options.routing,
        mean_tokens=length,
        warm_up=options.warm_up,
        steps=options.steps,
        hardware=hardware,
        imbalance=options.imbalance,
    )
    if options.routing == "forced" and not shape.is_moe:
        raise ValueError(f"--routing: forced needs a mixture-of-experts model, {shape.name} is dense")
    cases = make_cases(
        run.layout,
        shape,
        ep_sizes=options.ep,
        world_sizes=options.world_size,
        scalings=[each for each in SCALINGS if options.scaling in ("both", each)],
        sequences=run.sequences_per_mini_batch if options.sequences is None else options.sequences,
    )
    if all(case.problem for case in cases):
        raise ValueError(f"--ep: no layout can be run; the first: {cases[0].problem}")
    if options.row is not None and options.row >= len(cases):
        raise ValueError(f"--row: {options.row}, expected 0 to {len(cases) - 1}: the study has {len(cases)} layouts")
    if options.row is not None and not Path(run.model.path).exists():
        raise ValueError(f"--row: array tasks share one model, but model.path = {run.model.path} does not exist")
    if options.dry_run:
        for case in cases:
            typer.echo(f"{case.key}: {case.problem or 'would be studied'}")
        return
    if options.node_rank == 0:
        open_study(folder, run, settings)
        _predict(folder, cases, shape, training, machine, work, settings)
    if options.measure:
        place = Nodes(
            count=options.nodes,
            rank=options.node_rank,
            gpus=capabilities.cuda_devices or None,
            address=options.master_address,
            port=options.master_port,
        )
        chosen = cases if options.row is None else [cases[options.row]]
        _measure(folder, run, chosen, shape, training, machine, settings, place, timeout_s=options.timeout_s)
    if options.routing_study:
        _study_routing(folder, run, cases, shape, training, machine, work, count=options.routing_study, timeout_s=options.timeout_s)
    if options.row is None:
        _report(folder, cases, machine)


def _predict(
    folder: Path, cases: Sequence[Case], shape: ModelShape, training: Training, machine: Hardware, work: Work, settings: Settings
) -> None:
    from megatron_minpro.scaling.rows import describe, predicted, write_row
    from parallel.planner.plan import make_plan

    for case in cases:
        row = describe(case, shape, training, settings, kind="predicted")
        if case.problem is None:
            assert case.layout is not None
            row = predicted(row, make_plan(shape, case.layout, training, machine, replace(work, sequences=case.sequences)))
        write_row(folder, row)


def _measure(
    folder: Path,
    run: RunConfig,
    cases: Sequence[Case],
    shape: ModelShape,
    training: Training,
    machine: Hardware,
    settings: Settings,
    nodes: Nodes,
    *,
    timeout_s: float,
) -> None:
    from megatron_minpro.scaling.measure import measure_case, model_folder
    from megatron_minpro.scaling.rows import describe, read_row, write_row
    from parallel.capabilities import detect
    from parallel.planner.models import read_shape

    model = model_folder(run, folder)
    weights = "checkpoint" if model == Path(run.model.path) else "random"
    shape = read_shape(model)
    for number, case in enumerate(cases, start=1):
        known = read_row(folder, "measured", case.key)
        if known is not None and known.status in _FINISHED and known.weights == weights:
            typer.echo(f"{number} of {len(cases)}: {case.key} is there already ({known.status})")
            continue
        row = replace(describe(case, shape, training, settings, kind="measured"), weights=weights)
        if case.problem is not None and nodes.rank > 0:
            continue  # the first machine says so
        if case.problem is None:
            typer.echo(f"{number} of {len(cases)}: {case.key} ...")
            found = measure_case(row, case, folder, model, nodes, shape=shape, hardware=machine, capabilities=detect(), timeout_s=timeout_s)
            if found is None:
                continue
            row = found
        write_row(folder, row)
        said = f"{row.step_s:.4g} s a step" if row.step_s is not None else f"{row.status}: {row.reason}"
        typer.echo(f"{number} of {len(cases)}: {case.key}: {said}")


def _study_routing(
    folder: Path,
    run: RunConfig,
    cases: Sequence[Case],
    shape: ModelShape,
    training: Training,
    machine: Hardware,
    work: Work,
    *,
    count: int,
    timeout_s: float,
) -> None:
    import torch

    from checkpoints_convert.atomic_files import write_atomically
    from megatron_minpro.scaling.measure import Nodes, nodes_needed, run_ranks
    from megatron_minpro.scaling.routing import real_sequences, routing_costs
    from parallel.capabilities import detect

    model = Path(run.model.path)
    if not shape.is_moe or not model.exists():
        raise ValueError(f"--routing-study: model.path = {model}: expected the folder of a trained mixture-of-experts model")
    texts, source = real_sequences(run, count=count)
    path = folder / "routing_texts.json"
    write_atomically(path, json.dumps(texts))
    typer.echo(f"expert choices of {len(texts)} {source} ...")
    here = Nodes(count=1, rank=0, gpus=detect().cuda_devices or None, address="127.0.0.1", port=0)
    nodes_needed(run.layout.world_size, here)
    request = {"task": "route", "layout": asdict(run.layout), "texts": str(path)}
    found = run_ranks("routing", request, folder, model, here, 1, timeout_s=timeout_s)
    if "counts" not in found:
        raise RuntimeError(f"--routing-study: {found['reason']}")
    costs = routing_costs(torch.tensor(found["counts"]), found["lengths"], cases, shape, training, machine, work)
    content = {"source": f"{len(texts)} {source}", "model": str(model), **found, "costs": [asdict(cost) for cost in costs]}
    write_atomically(folder / "routing.json", json.dumps(content) + "\n")


def _report(folder: Path, cases: Sequence[Case], machine: Hardware) -> None:
    from megatron_minpro.scaling.plots import plot_study
    from megatron_minpro.scaling.routing import RoutingCost
    from megatron_minpro.scaling.rows import rows_of, write_tables
    from megatron_minpro.scaling.tables import write_report

    rows = rows_of(folder, cases)
    write_tables(folder, rows)
    costs: list[RoutingCost] = []
    source = None
    if (folder / "routing.json").exists():
        content = json.loads((folder / "routing.json").read_text(encoding="utf-8"))
        costs, source = [RoutingCost(**cost) for cost in content["costs"]], content["source"]
    typer.echo(write_report(folder, rows, costs, routing_source=source))
    plot_study(folder, rows, machine)
    typer.echo(f"written to {folder}: report.md, rows.jsonl, rows.csv, plots/")
