"""Compares two checkpoints of either format bit for bit, and one checkpoint with its manifest."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from checkpoints_convert.copying import Meter, ProgressFunction, bytes_of, equal_bits, no_garbage_collection, row_blocks, run_in_threads
from checkpoints_convert.manifest import MANIFEST_FILE, read_manifest
from checkpoints_convert.mapping import TIED_COPIES
from checkpoints_convert.weights import Weights, open_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """first_difference: of the first differing tensor, in the order of the first checkpoint; None when all are equal bit for bit."""

    num_tensors: int
    num_bytes: int
    num_differences: int  # tensors
    first_difference: str | None


@no_garbage_collection()
def compare(
    first: str | Path,
    second: str | Path,
    *,
    workers: int,
    config: str | Path | None = None,
    progress: ProgressFunction | None = None,
) -> Comparison:
    """Compare names, shapes, dtypes and bits of all tensors of two checkpoints, under their Hugging Face names.

    config: the folder whose config.json describes a torch_dist checkpoint that has none of its own; default the other checkpoint.
    A stored copy of a tied tensor is compared with what it copies where the other side has none. Raises ValueError for a checkpoint
    that cannot be read.
    """
    first, second = Path(first), Path(second)
    with (
        open_weights(first, config=_config_for(first, second, config)) as a,
        open_weights(second, config=_config_for(second, first, config)) as b,
    ):
        names = list(dict.fromkeys((*a.names, *b.names)))
        in_a, in_b = set(a.names), set(b.names)
        meter = Meter(len(names), sum((a if name in in_a else b).spec(name).num_bytes for name in names), progress)

        def difference(name: str) -> str | None:
            left, right = _stored(name, in_a), _stored(name, in_b)
            if left is None or right is None:
                here, there = (first, second) if left is not None else (second, first)
                return f"{there}: has no {name!r}, which {here} has"
            return _difference(a, left, b, right, name, meter)

        found = _collect(names, difference, meter, workers=workers)
    return Comparison(
        num_tensors=len(names), num_bytes=meter.num_bytes, num_differences=len(found), first_difference=next(iter(found.values()), None)
    )


@no_garbage_collection()
def check_manifest(
    directory: str | Path, *, workers: int, config: str | Path | None = None, progress: ProgressFunction | None = None
) -> Comparison:
    """Compare every tensor of one checkpoint with the hash in its manifest. Raises ValueError when it has none, or cannot be read."""
    directory = Path(directory)
    manifest = read_manifest(directory)
    if manifest is None:
        raise ValueError(f"{directory}: has no {MANIFEST_FILE}; expected a converted checkpoint, or a second one to compare with")
    with open_weights(directory, config=config) as weights:
        present = set(weights.names)
        names = list(dict.fromkeys((*manifest.tensors, *weights.names)))
        meter = Meter(len(names), sum(record.spec.num_bytes for record in manifest.tensors.values()), progress)

        def difference(name: str) -> str | None:
            stored = _stored(name, present)
            if stored is None or name not in manifest.tensors:
                return f"{directory}: {name!r} is in only one of {MANIFEST_FILE} and the weights"
            record, digest = manifest.tensors[name], xxhash.xxh3_128()
            spec = weights.spec(stored)
            if (spec.shape, spec.dtype) != (record.spec.shape, record.spec.dtype):
                return f"{weights.file(stored)}: {name!r} is {spec.dtype} {spec.shape}; expected {record.spec.dtype} {record.spec.shape}"
            for _, rows in _blocks(weights, stored):
                digest.update(bytes_of(rows))
                meter.add(num_bytes=rows.nbytes)
            if digest.hexdigest() != record.digest:
                return f"{weights.file(stored)}: {name!r} has XXH3 hash {digest.hexdigest()[:16]}...; expected {record.digest[:16]}..."
            return None

        found = _collect(names, difference, meter, workers=workers)
    return Comparison(
        num_tensors=len(names), num_bytes=meter.num_bytes, num_differences=len(found), first_difference=next(iter(found.values()), None)
    )


def _config_for(directory: Path, other: Path, config: str | Path | None) -> str | Path:
    if config is not None:
        return config
    return directory if (directory / "config.json").is_file() else other


def _stored(name: str, present: set[str]) -> str | None:
    """The name under which a side has a tensor: a copy of a tied one may be left out."""
    if name in present:
        return name
    return TIED_COPIES.get(name) if TIED_COPIES.get(name) in present else None


def _collect(names: list[str], difference: Callable[[str], str | None], meter: Meter, *, workers: int) -> dict[str, str]:
    found: dict[str, str] = {}
    lock = threading.Lock()

    def work(name: str) -> None:
        text = difference(name)
        meter.add(tensors=1)
        if text is not None:
            with lock:
                found[name] = text

    run_in_threads(work, names, workers=workers)
    return {name: found[name] for name in names if name in found}


def _difference(a: Weights, left: str, b: Weights, right: str, name: str, meter: Meter) -> str | None:
    spec, other = a.spec(left), b.spec(right)
    if (spec.shape, spec.dtype) != (other.shape, other.dtype):
        return f"{b.file(right)}: {name!r} is {other.dtype} {other.shape}; {spec.dtype} {spec.shape} in {a.file(left)}"
    for (start, here), (_, there) in zip(_blocks(a, left), _blocks(b, right), strict=True):
        meter.add(num_bytes=here.nbytes)
        if not equal_bits(here, there):
            element, x, y = _first_unequal(here, there)
            position = (start + element[0], *element[1:]) if element else ()
            return f"{b.file(right)}: {name!r} differs first at {position}: {y!r}, but {x!r} in {a.file(left)}"
    return None


def _blocks(weights: Weights, name: str) -> Iterator[tuple[int, Tensor]]:
    """A tensor a few rows at a time, each with the number of its first row; a tensor without axes (the scale of an fp8 one) at once."""
    spec = weights.spec(name)
    if not spec.shape:
        yield 0, weights.read(name)
    elif spec.num_bytes:
        for start, count in row_blocks(spec.shape[0], spec.num_bytes // spec.shape[0]):
            yield start, weights.read_rows(name, start, start + count)


def _first_unequal(here: Tensor, there: Tensor) -> tuple[tuple[int, ...], float, float]:
    """Position and values of the first element that differs in any bit."""
    size = here.element_size()
    unequal = (here.reshape(-1).view(torch.uint8) != there.reshape(-1).view(torch.uint8)).view(-1, size).any(dim=1)
    flat = int(unequal.nonzero()[0])
    position = tuple(int(index) for index in torch.unravel_index(torch.tensor(flat), here.shape))
    return position, here.reshape(-1)[flat].item(), there.reshape(-1)[flat].item()
