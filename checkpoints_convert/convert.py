"""Hugging Face safetensors <-> Megatron torch_dist, tensor by tensor: no model, no process group, no GPU, memory for a few blocks of rows.

A destination appears whole or not at all. While it is written it is called `.<name>.unfinished` and holds a journal; a process that was
killed is continued with `resume`, which copies nothing that the journal says is on the disk already.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from checkpoints_convert.atomic_directory import check_apart, check_replaceable, resumable_directory, write_file
from checkpoints_convert.companions import companion_files
from checkpoints_convert.conversion_plan import check_dtype, check_space, fingerprint, plan_hugging_face_files, torch_dist_parts
from checkpoints_convert.copying import Meter, ProgressFunction, bytes_of, no_garbage_collection, row_blocks, run_in_threads
from checkpoints_convert.dtypes import DTYPES
from checkpoints_convert.extra_state import extra_state_keys
from checkpoints_convert.hf_config import Architecture, config_with_both_spellings, read_architecture, read_config
from checkpoints_convert.journal import Journal
from checkpoints_convert.manifest import MANIFEST_FILE, Manifest, TensorRecord, read_manifest
from checkpoints_convert.mapping import TIED_COPIES, Parameter, check_hf_tensors, parameters, torch_dist_key
from checkpoints_convert.megatron_weights import MegatronWeights
from checkpoints_convert.safetensors_format import INDEX_FILE, TensorSpec
from checkpoints_convert.safetensors_io import SafetensorsReader, SafetensorsWriter
from checkpoints_convert.torch_dist_metadata import METADATA_FILE
from checkpoints_convert.torch_dist_writer import TorchDistWriter

Hashes = Mapping[str, str]  # tensor name -> XXH3 of 128 bits, hexadecimal


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionReport:
    """What a conversion did. Bytes and tensors are those of the model, under their Hugging Face names."""

    destination: str
    num_tensors: int
    num_bytes: int
    resumed_tensors: int  # of num_tensors: an earlier attempt had them on the disk
    seconds: float


@no_garbage_collection()
def hf_to_megatron(
    source: str | Path,
    destination: str | Path,
    *,
    workers: int,
    resume: bool = False,
    force: bool = False,
    progress: ProgressFunction | None = None,
) -> ConversionReport:
    """Write a Hugging Face Qwen3 or Qwen3-MoE folder as a torch_dist checkpoint that any layout and either layer spec of Megatron loads.

    The destination also gets config.json, the tokenizer's files and the manifest, so that nothing else is needed to convert it back.
    workers: threads. resume: continue an unfinished conversion of the same source, if there is one. force: replace a destination that is a
    checkpoint, or empty.

    Raises ValueError, naming file and tensor, for a source that is damaged, that is not the model its config.json describes or that its
    manifest contradicts, and for a destination that exists; OSError when reading or writing fails. The destination is then as it was.
    """
    started = time.monotonic()
    source, destination = Path(source), Path(destination)
    check_apart(source, destination)
    if force:
        check_replaceable(destination)
    architecture = read_architecture(source)
    with SafetensorsReader(source) as reader:
        specs = {name: reader.spec(name) for name in reader.names}
        copies = check_hf_tensors(architecture, {name: spec.shape for name, spec in specs.items()}, source=source)
        parts = torch_dist_parts(architecture, {name: spec.dtype for name, spec in specs.items()}, source=source)
        table = {parameter.megatron_name: parameter for parameter in parameters(architecture)}
        origin = read_manifest(source)
        known = {} if origin is None else origin.hashes()
        identity = fingerprint("hf-to-megatron", (reader.file(name) for name in specs), architecture)
        with (
            resumable_directory(destination, replace=force, resume=resume) as directory,
            Journal(directory, fingerprint=identity) as journal,
            TorchDistWriter(directory, parts, objects=extra_state_keys(architecture), destination=destination, reopen=resume) as writer,
        ):
            check_space(directory, writer.num_bytes, destination=destination)
            work = _Work(journal, writer.sync, Meter(len(specs), sum(spec.num_bytes for spec in specs.values()), progress))
            items = {name: [specs[each] for each in parameter.hf_names] for name, parameter in table.items()}

            def copy(item: str) -> Hashes:
                return _copy_to_megatron(table[item], reader, writer, known, work.meter)

            def skip(item: str) -> None:
                key = torch_dist_key(table[item])
                for name in key.names:
                    writer.skip(name, key.index)

            hashes = work.run(items, copy, skip, workers=workers)
            for name in copies:
                hashes[name] = _hash_copy(name, reader, hashes, work.meter)
            writer.finish()
            order = [name for parameter in table.values() for name in parameter.hf_names] + list(copies)
            records = {name: TensorRecord(specs[name], hashes[name], reader.file(name).name) for name in order}
            index = source / INDEX_FILE
            manifest = Manifest(records, index.read_text() if index.is_file() else None)
            _write_files(directory, {**companion_files(source), "config.json": (source / "config.json").read_bytes()}, manifest)
            journal.remove()
    return work.report(destination, manifest, started)


@no_garbage_collection()
def megatron_to_hf(
    source: str | Path,
    destination: str | Path,
    *,
    workers: int,
    config: str | Path | None = None,
    max_shard_bytes: int | None = None,
    dtype: torch.dtype | None = None,
    resume: bool = False,
    force: bool = False,
    progress: ProgressFunction | None = None,
) -> ConversionReport:
    """Write a torch_dist checkpoint of Qwen3 or Qwen3-MoE as the Hugging Face folder that transformers and SGLang load.

    source: anything that Megatron or the trainer saved; the optimizer's part is skipped. config: the folder with config.json and the
    tokenizer, default the source itself. max_shard_bytes: of a weights file, default that of the files the source was made from, else
    4 GB. dtype: default that of the source. resume, force and errors as `hf_to_megatron`.
    """
    started = time.monotonic()
    source, destination = Path(source), Path(destination)
    check_apart(source, destination)
    if force:
        check_replaceable(destination)
    folder = source if config is None else Path(config)
    architecture = Architecture.from_config(read_config(folder), source=folder / "config.json")
    with MegatronWeights(source, architecture) as weights:
        for name in weights.names:
            check_dtype(name, weights.dtype(name), source=source)
        dtypes = {name: weights.dtype(name) if dtype is None else dtype for name in weights.names}
        origin = read_manifest(source)
        files = plan_hugging_face_files(architecture, dtypes, origin=origin, max_shard_bytes=max_shard_bytes)
        owners = {spec.name: file for file, group in files.shards.items() for spec in group}
        specs = {spec.name: spec for group in files.shards.values() for spec in group}
        known = {} if origin is None else origin.hashes()
        identity = fingerprint("megatron-to-hf", (*weights.files, source / METADATA_FILE), (architecture, files))
        with (
            resumable_directory(destination, replace=force, resume=resume) as directory,
            Journal(directory, fingerprint=identity) as journal,
            SafetensorsWriter(directory, files.shards, destination=destination, reopen=resume) as writer,
        ):
            check_space(directory, files.num_bytes, destination=destination)
            work = _Work(journal, writer.sync, Meter(len(specs), sum(spec.num_bytes for spec in specs.values()), progress))

            def copy(item: str) -> Hashes:
                return {item: _copy_to_hf(specs[item], weights, writer, known, work.meter)}

            hashes = work.run({name: [spec] for name, spec in specs.items()}, copy, writer.skip, workers=workers)
            writer.check_complete()
            manifest = Manifest({name: TensorRecord(spec, hashes[name], owners[name]) for name, spec in specs.items()}, files.index)
            extra = {**companion_files(folder), "config.json": _config_text(folder, specs["model.embed_tokens.weight"].dtype)}
            if files.index is not None:
                extra[INDEX_FILE] = files.index.encode()
            _write_files(directory, extra, manifest)
            journal.remove()
    return work.report(destination, manifest, started)


class _Work:
    """The items of one conversion: those that the journal holds are counted, the others copied."""

    def __init__(self, journal: Journal, sync: Callable[[], None], meter: Meter) -> None:
        self.meter = meter
        self._journal, self._sync = journal, sync
        self._resumed = 0

    def run(
        self,
        items: Mapping[str, Sequence[TensorSpec]],
        copy: Callable[[str], Hashes],
        skip: Callable[[str], None],
        *,
        workers: int,
    ) -> dict[str, str]:
        """The hash of every tensor. items: name -> its Hugging Face tensors."""
        for item in self._journal.done:
            skip(item)
            self._resumed += len(items[item])
            self.meter.add(tensors=len(items[item]), num_bytes=sum(spec.num_bytes for spec in items[item]))

        def work(item: str) -> None:
            hashes = copy(item)
            self.meter.add(tensors=len(hashes))
            self._journal.add(item, hashes, sync=self._sync)

        run_in_threads(work, [item for item in items if item not in self._journal.done], workers=workers)
        return {name: digest for item in items for name, digest in self._journal.done[item].items()}

    def report(self, destination: Path, manifest: Manifest, started: float) -> ConversionReport:
        return ConversionReport(
            destination=str(destination),
            num_tensors=len(manifest.tensors),
            num_bytes=sum(record.spec.num_bytes for record in manifest.tensors.values()),
            resumed_tensors=self._resumed,
            seconds=time.monotonic() - started,
        )


def _copy_to_megatron(parameter: Parameter, reader: SafetensorsReader, writer: TorchDistWriter, known: Hashes, meter: Meter) -> Hashes:
    key = torch_dist_key(parameter)
    hashes = {}
    for name, runs in zip(parameter.hf_names, parameter.row_runs(), strict=True):
        digest = xxhash.xxh3_128()
        spec = reader.spec(name)
        for run in runs:
            for first, count in row_blocks(run.num_rows, spec.num_bytes // spec.shape[0]):
                rows = reader.read_rows(name, run.hf_row + first, run.hf_row + first + count)
                digest.update(bytes_of(rows))
                for each in key.names:
                    writer.write_rows(each, key.index, run.megatron_row + first, rows)
                meter.add(num_bytes=rows.nbytes)
        hashes[name] = _expected(digest.hexdigest(), name, known, reader.file(name))
    return hashes


def _copy_to_hf(spec: TensorSpec, weights: MegatronWeights, writer: SafetensorsWriter, known: Hashes, meter: Meter) -> str:
    """The hash of what was written."""
    stored = spec.name if spec.name in weights else TIED_COPIES[spec.name]
    read, written = xxhash.xxh3_128(), xxhash.xxh3_128()
    for first, count in row_blocks(spec.shape[0], spec.num_bytes // spec.shape[0]):
        rows = weights.read_rows(stored, first, first + count)
        read.update(bytes_of(rows))
        if rows.dtype != spec.dtype:
            rows = _cast(rows, spec, first, source=weights.file(stored))
            written.update(bytes_of(rows))
        writer.write_rows(spec.name, first, rows)
        meter.add(num_bytes=rows.nbytes)
    digest = _expected(read.hexdigest(), stored, known, weights.file(stored))
    return digest if weights.dtype(stored) == spec.dtype else written.hexdigest()


def _cast(rows: Tensor, spec: TensorSpec, first: int, *, source: Path) -> Tensor:
    cast = rows.to(spec.dtype)
    if not torch.equal(cast.isfinite(), rows.isfinite()):  # float16 ends at 65,504
        largest = rows[rows.isfinite()].abs().max().item()
        where = f"rows {first} to {first + len(rows) - 1}"
        raise ValueError(f"{source}: {spec.name!r} holds {largest:g} in {where}; expected numbers that {spec.dtype} can hold")
    return cast


def _hash_copy(name: str, reader: SafetensorsReader, hashes: Hashes, meter: Meter) -> str:
    """The hash of a stored copy of a tied tensor, which Megatron keeps once. Raises ValueError when the copy says something else."""
    spec = reader.spec(name)
    digest = xxhash.xxh3_128()
    for first, count in row_blocks(spec.shape[0], spec.num_bytes // spec.shape[0]):
        digest.update(bytes_of(reader.read_rows(name, first, first + count)))
    meter.add(tensors=1, num_bytes=spec.num_bytes)
    if digest.hexdigest() != hashes[TIED_COPIES[name]]:
        raise ValueError(f"{reader.file(name)}: {name!r} differs from {TIED_COPIES[name]!r}; expected equal ones, as config.json ties them")
    return digest.hexdigest()


def _expected(digest: str, name: str, known: Hashes, path: Path) -> str:
    if known and known.get(name) != digest:
        raise ValueError(
            f"{path}: {name!r} has XXH3 hash {digest[:16]}...; expected {known.get(name, 'none')[:16]}... from {MANIFEST_FILE} "
            "(damaged, or changed since; then remove that file)"
        )
    return digest


def _config_text(folder: Path, dtype: torch.dtype) -> bytes:
    """config.json in both spellings and with the dtype of the weights; the same bytes where it is so already."""
    config = read_config(folder)
    name = next(name for name, known in DTYPES.items() if known == dtype)
    complete = config_with_both_spellings({**config, "torch_dtype": name, "dtype": name})
    if complete == config:
        return (folder / "config.json").read_bytes()
    return (json.dumps(complete, indent=2) + "\n").encode()


def _write_files(directory: Path, files: Mapping[str, bytes], manifest: Manifest) -> None:
    for name, content in {**files, MANIFEST_FILE: manifest.to_bytes()}.items():
        write_file(directory / name, content)
