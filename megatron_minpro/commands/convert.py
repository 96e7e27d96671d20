"""`minpro convert`: checkpoints between Hugging Face's format and Megatron's, compared, described, quantized."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_minpro.commands.byte_size import parse_size
from megatron_minpro.commands.quantize import quantize

if TYPE_CHECKING:
    from checkpoints_convert.copying import ProgressFunction
    from checkpoints_convert.preview import Preview

app = typer.Typer(
    rich_markup_mode=None,
    help="Convert checkpoints between Hugging Face safetensors and Megatron torch_dist, at disk speed and with little memory.\n\n"
    "\b\n"
    "Example:\n"
    "  minpro convert hf-to-megatron Qwen3-30B-A3B qwen3_30b_torch_dist\n"
    "  minpro convert megatron-to-hf runs/tiny_moe_cpu/checkpoints/latest tiny_moe\n"
    "  minpro convert verify Qwen3-30B-A3B qwen3_30b_torch_dist",
)
app.command("quantize")(quantize)


@app.callback(invoke_without_command=True)
def _group(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


class Dtype(StrEnum):
    """What weights may be cast to."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


Workers = Annotated[int, typer.Option(min=1, help="threads that read, hash and write")]
Resume = Annotated[bool, typer.Option("--resume", help="continue what a killed conversion left; keep what is done if this one fails")]
Force = Annotated[bool, typer.Option("--force", help="replace DST where it is a checkpoint")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print files, bytes and a time estimate; write nothing")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON for programs, no progress")]
Config = Annotated[Path | None, typer.Option(help="folder with config.json and tokenizer  [default: found out]")]
Source = Annotated[Path, typer.Argument(metavar="SRC", help="the checkpoint to read")]
Destination = Annotated[Path, typer.Argument(metavar="DST", help="the folder to write")]

DEFAULT_WORKERS = min(8, os.cpu_count() or 1)


@app.command("hf-to-megatron")
def hf_to_megatron(
    source: Source,
    destination: Destination,
    workers: Workers = DEFAULT_WORKERS,
    resume: Resume = False,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Write a Hugging Face folder as a torch_dist checkpoint, for any layout and either layer spec of Megatron-Core.

    \b
    Example:
      minpro convert hf-to-megatron Qwen3-30B-A3B qwen3_30b_torch_dist --workers 8
      minpro convert hf-to-megatron Qwen3-30B-A3B qwen3_30b_torch_dist --dry-run    # config.json and the index suffice
    """
    if dry_run:
        from checkpoints_convert.preview import preview_hf_to_megatron

        _show_preview(preview_hf_to_megatron(source, destination), destination, as_json=as_json)
        return
    from checkpoints_convert import convert

    with _progress("converting", shown=not as_json) as progress:
        report = convert.hf_to_megatron(source, destination, workers=workers, resume=resume, force=force, progress=progress)
    _show_report(report, as_json=as_json)


@app.command("megatron-to-hf")
def megatron_to_hf(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="a torch_dist folder; or a run, its checkpoints/latest or one step")],
    destination: Destination,
    config: Config = None,
    shard_size: Annotated[
        str | None, typer.Option(help="largest weights file, as 4GB  [default: the files that SRC was converted from, else 4GB]")
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="cast the weights  [default: as they are]")] = None,
    workers: Workers = DEFAULT_WORKERS,
    resume: Resume = False,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Write a torch_dist checkpoint as the Hugging Face folder that transformers and SGLang load. The optimizer is skipped.

    \b
    Example:
      minpro convert megatron-to-hf runs/tiny_moe_cpu/checkpoints/latest tiny_moe
      minpro convert megatron-to-hf iter_0000500 out --config Qwen3-30B-A3B --dtype bfloat16
    """
    import torch

    from checkpoints_convert.checkpoint_location import locate_checkpoint

    location = locate_checkpoint(source, config=config)
    options: dict[str, Any] = {
        "config": location.model,
        "max_shard_bytes": None if shard_size is None else parse_size(shard_size),
        "dtype": None if dtype is None else getattr(torch, dtype.value),
    }
    if dry_run:
        from checkpoints_convert.preview import preview_megatron_to_hf

        _show_preview(preview_megatron_to_hf(location.weights, destination, **options), destination, as_json=as_json)
        return
    from checkpoints_convert import convert

    with _progress("converting", shown=not as_json) as progress:
        report = convert.megatron_to_hf(
            location.weights, destination, workers=workers, resume=resume, force=force, progress=progress, **options
        )
    _show_report(report, as_json=as_json)


@app.command("verify")
def verify(
    first: Annotated[Path, typer.Argument(metavar="A", help="a checkpoint of either format")],
    second: Annotated[Path | None, typer.Argument(metavar="[B]", help="another; without it A is compared with its manifest")] = None,
    config: Config = None,
    workers: Workers = DEFAULT_WORKERS,
    as_json: AsJson = False,
) -> None:
    """Compare two checkpoints bit for bit; the first difference is named. Exit code 1 when they differ.

    \b
    Example:
      minpro convert verify Qwen3-30B-A3B qwen3_30b_torch_dist
      minpro convert verify qwen3_30b_torch_dist                 # with the hashes of its own manifest
    """
    from checkpoints_convert.checkpoint_location import locate_checkpoint
    from checkpoints_convert.verify import check_manifest, compare

    a = locate_checkpoint(first, config=config)
    with _progress("comparing", shown=not as_json) as progress:
        if second is None:
            found = check_manifest(a.weights, workers=workers, config=a.model, progress=progress)
        else:
            b = locate_checkpoint(second, config=config)
            model = next((each.model for each in (a, b) if (each.model / "config.json").is_file()), a.model)
            found = compare(a.weights, b.weights, workers=workers, config=model, progress=progress)
    if as_json:
        typer.echo(json.dumps({**asdict(found), "equal": found.num_differences == 0}))
    if found.first_difference is not None:
        raise RuntimeError(f"{found.num_differences} of {found.num_tensors} tensors differ, the first: {found.first_difference}")
    if not as_json:
        typer.echo(f"equal: {found.num_tensors:,} tensors, {found.num_bytes:,} bytes")


@app.command("inspect")
def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="a checkpoint of either format")],
    tensors: Annotated[bool, typer.Option("--tensors", help="list every tensor")] = False,
    as_json: AsJson = False,
) -> None:
    """Say what a checkpoint holds, from its headers alone.

    \b
    Example:
      minpro convert inspect runs/tiny_moe_cpu/checkpoints/latest --tensors
    """
    from checkpoints_convert.checkpoint_location import weights_folder
    from checkpoints_convert.inspection import inspect as examine

    folder = weights_folder(path)
    found = examine(folder)
    content = {"path": str(folder), **asdict(found)}
    listed = content.pop("tensors")
    if as_json:
        typer.echo(json.dumps({**content, "tensors": listed} if tensors else content))
        return
    if content["model_type"] is None:
        content["model_type"] = "not named (no config.json here)"
    for key, value in content.items():
        typer.echo(f"{key.replace('_', ' ')}: {f'{value:,}' if type(value) is int else value}")
    for tensor in listed if tensors else ():
        typer.echo(f"{tensor['name']}  {list(tensor['shape'])}  {tensor['dtype']}")


@contextmanager
def _progress(what: str, *, shown: bool) -> Iterator[ProgressFunction | None]:
    """A bar on stderr: bytes, GB/s, time left."""
    if not shown:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description} {task.fields[tensors]} tensors"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bars:
        task = bars.add_task(what, total=None, tensors="")

        def report(progress: Any) -> None:
            bars.update(
                task, completed=progress.bytes, total=progress.num_bytes, tensors=f"{progress.tensors:,} of {progress.num_tensors:,}"
            )

        yield report


def _show_report(report: Any, *, as_json: bool) -> None:
    gb_per_s = report.num_bytes / 1e9 / report.seconds
    if as_json:
        typer.echo(json.dumps({**asdict(report), "gb_per_s": gb_per_s}))
        return
    resumed = f", {report.resumed_tensors:,} of them by an earlier attempt" if report.resumed_tensors else ""
    typer.echo(
        f"{report.destination}: {report.num_tensors:,} tensors{resumed}, {report.num_bytes:,} bytes, "
        f"{report.seconds:.1f} s, {gb_per_s:.2f} GB/s"
    )


def _show_preview(preview: Preview, destination: Path, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"destination": str(destination), **asdict(preview)}))
        return
    for name, num_bytes in preview.files.items():
        typer.echo(f"{destination / name}  {num_bytes:,} bytes")
    typer.echo(
        f"{preview.num_tensors:,} tensors, {preview.num_parameters:,} parameters, {preview.num_bytes:,} bytes in {len(preview.files)} files"
    )
    typer.echo(f"about {_duration(preview.estimate_s)} at {preview.gb_per_s:.2f} GB/s, measured in {destination.absolute().parent}")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min"
