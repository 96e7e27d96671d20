"""`minpro convert quantize`: prompts from a file, a quantized Hugging Face folder, and what it costs in log-probabilities."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from megatron_minpro.commands.byte_size import parse_size
from megatron_minpro.commands.parameters import AsJson, takes
from megatron_minpro.option import Option

if TYPE_CHECKING:
    from rich.table import Table

    from checkpoints_convert.quantize import QuantizeReport


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeOptions:
    """What `minpro convert quantize` is asked for."""

    source: Annotated[Path, Option("a Hugging Face folder with weights and tokenizer", argument=True, metavar="SRC")]
    destination: Annotated[Path, Option("the quantized folder to write", argument=True, metavar="DST")]
    number_format: Annotated[Literal["fp8", "nvfp4"], Option("fp8 runs on a CPU; nvfp4 needs CUDA", flags=("--format",))]
    prompts: Annotated[Path, Option("calibration prompts, .jsonl, .jsonl.gz, .json or .parquet")]
    field: Annotated[str, Option("dotted path to the prompt in a row: a text, or a list of chat messages")]
    held_out: Annotated[
        int | None,
        Option("measure on the last N prompts and calibrate on the others; 0: on the same  [default: a quarter]", minimum=0),
    ] = None
    max_tokens: Annotated[int, Option("longer prompts are cut", minimum=2)] = 2048
    device: Annotated[Literal["cpu", "cuda"], Option("where the model runs while it is calibrated")] = "cpu"
    shard_size: Annotated[str, Option("largest weights file")] = "4GB"
    force: Annotated[bool, Option("replace DST where it is a checkpoint")] = False
    dry_run: Annotated[bool, Option("check everything, count the prompts, write nothing")] = False
    as_json: AsJson = False


@takes(QuantizeOptions)
def quantize(options: QuantizeOptions) -> None:
    """Quantize a Hugging Face folder with nvidia-modelopt, check every tensor, report the logit error.

    \b
    Example:
      minpro convert quantize policy policy_fp8 --format fp8 --prompts dapo.parquet --field prompt
      minpro convert quantize policy policy_fp4 --format nvfp4 --device cuda --prompts chats.jsonl --field messages --held-out 32
    """
    import torch

    from checkpoints_convert import quantize as library
    from checkpoints_convert.companions import companion_files
    from checkpoints_convert.quantized_weights import Format

    number_format, device = Format(options.number_format), torch.device(options.device)
    source, destination = options.source, options.destination
    library.check_possible(number_format, device)
    token_ids = _tokenized(source, options.prompts, options.field, options.max_tokens)
    calibration, measured = _split(token_ids, options.held_out, options.prompts)
    if options.dry_run:
        library.check_quantizable(source, destination, number_format=number_format, device=device, replace=options.force)
        _show_dry_run(options, calibration, measured)
        return
    with _Progress() as progress:
        report = library.quantize_checkpoint(
            source,
            destination,
            number_format=number_format,
            calibration=calibration,
            measured=measured,
            device=device,
            max_shard_bytes=parse_size(options.shard_size),
            companions=companion_files(source),
            replace=options.force,
            progress=progress.show,
        )
    if options.as_json:
        typer.echo(json.dumps({"source": str(source), "destination": str(destination), **asdict(report)}, indent=2))
    else:
        from rich.console import Console

        Console(highlight=False).print(_table(report, destination))


def _show_dry_run(options: QuantizeOptions, calibration: list[list[int]], measured: list[list[int]]) -> None:
    counts = {"calibration_prompts": len(calibration), "measured_prompts": len(measured), "calibration_tokens": sum(map(len, calibration))}
    if options.as_json:
        typer.echo(json.dumps({"source": str(options.source), "destination": str(options.destination), **counts}))
        return
    typer.echo(
        f"{options.source} would become {options.destination} in {options.number_format}: calibrated on {len(calibration)} prompts with "
        f"{counts['calibration_tokens']:,} tokens, measured on {len(measured)}"
    )


def _tokenized(source: Path, prompts: Path, field: str, max_tokens: int) -> list[list[int]]:
    from checkpoints_convert.policy_folder import load_tokenizer
    from megatron_minpro.data.rows import check_file, read_rows
    from megatron_minpro.data.sources import read_field

    if not source.is_dir():
        raise ValueError(f"{source}: no such directory; expected a Hugging Face model folder")
    check_file(str(prompts), key="--prompts")
    tokenizer = load_tokenizer(source)
    result = []
    for where, row in read_rows(str(prompts), {}):
        value = read_field(row, field, where=where)
        if isinstance(value, str):
            token_ids = tokenizer(value).input_ids
        elif isinstance(value, list):
            token_ids = tokenizer.apply_chat_template(value, tokenize=True, add_generation_prompt=True, return_dict=False)
        else:
            raise ValueError(f"{where}: {field} is a {type(value).__name__}; expected a text or a list of chat messages")
        if not token_ids:
            raise ValueError(f"{where}: {field} has no tokens; expected a prompt")
        result.append(list(token_ids[:max_tokens]))
    return result


def _split(token_ids: list[list[int]], held_out: int | None, prompts: Path) -> tuple[list[list[int]], list[list[int]]]:
    """(calibration, measured); one list twice where nothing is held out."""
    count = len(token_ids) // 4 if held_out is None else held_out
    if count >= len(token_ids):
        raise ValueError(f"--held-out {count}, but {prompts} has {len(token_ids)} prompts; expected at least one to calibrate on")
    if count == 0:
        return token_ids, token_ids
    return token_ids[:-count], token_ids[-count:]


class _Progress:
    """One bar per phase on stderr, which takes seconds to minutes each."""

    def __enter__(self) -> _Progress:
        from rich.console import Console
        from rich.progress import Progress

        self._bars = Progress(console=Console(stderr=True), disable=not sys.stderr.isatty())
        self._tasks: dict[str, Any] = {}
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def show(self, what: str, done: int, total: int) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total)
        self._bars.update(self._tasks[what], completed=done)


def _table(report: QuantizeReport, destination: Path) -> Table:
    from rich.table import Table

    logits, weights = report.logits, report.weights
    where = "the calibration prompts themselves" if report.measured_on_calibration else "prompts not calibrated on"
    table = Table(title=f"{destination}: {report.number_format}", title_justify="left", show_header=False)
    rows = (
        ("calibrated on", f"{report.calibration_prompts} prompts, {report.calibration_tokens} tokens ({report.device})"),
        ("measured on", f"{report.measured_prompts} prompts, {logits.num_positions} positions: {where}"),
        ("-log p of the next token", f"{logits.reference_nll:.5f} before, {logits.compared_nll:.5f} after"),
        ("its change", f"{logits.next_token_mean:.5f} mean, {logits.next_token_max:.5f} at most"),
        ("change over the vocabulary", f"{logits.vocabulary_mean:.5f} mean, {logits.vocabulary_max:.5f} at most"),
        ("KL per token", f"{logits.kl:.3g}"),
        ("same most probable token", f"{100 * logits.top1_agreement:.2f} %"),
        ("weights", f"{weights.quantized_tensors} quantized, {weights.kept_tensors} kept, relative error {weights.relative_error:.4f}"),
        ("bytes of the weights", f"{weights.source_bytes:,} before, {weights.quantized_bytes:,} after"),
    )
    for row in rows:
        table.add_row(*row)
    return table
