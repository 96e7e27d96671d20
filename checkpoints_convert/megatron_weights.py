"""Reads a Megatron torch_dist checkpoint by Hugging Face names, shapes and rows.

The same parameter is saved under several names. The layer is an axis of the saved tensor (`decoder.layers.mlp.router.weight`), or a
number in its key where layers differ (`decoder.layers.3.mlp.router.weight`); so is the expert (`experts.experts.17.linear_fc1`); with
both numbered, gate and up have tensors of their own (`linear_fc1.weight_w`, `linear_fc1.weight_v`). The vocabulary may be padded, and
everything may stand under a common prefix (`model.`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from checkpoints_convert.hf_config import Architecture
from checkpoints_convert.mapping import Parameter, RowRun, Shape, Split, parameters
from checkpoints_convert.safetensors_format import TensorSpec
from checkpoints_convert.torch_dist_reader import TorchDistReader

_EMBEDDING = "embedding.word_embeddings.weight"
_PADDED = (_EMBEDDING, "output_layer.weight")
_NUMBERED_LAYER = re.compile(r"(?<=layers)\.\d+\.")
_NUMBERED_EXPERT = re.compile(r"\.local_experts\.\d+\.")


@dataclass(frozen=True, slots=True)
class _Place:
    """Rows first_row to first_row + num_rows (exclusive) of a parameter are the first num_rows rows of `saved[index]`."""

    key: str
    index: Shape
    stacked: Shape  # lengths of the axes that index goes along
    first_row: int
    num_rows: int


@dataclass(frozen=True, slots=True)
class _HuggingFaceTensor:
    spec: TensorSpec
    runs: tuple[RowRun, ...]
    places: tuple[_Place, ...]


class MegatronWeights:
    """Reads Hugging Face tensors out of a torch_dist checkpoint, whatever layout and layer spec wrote it; the optimizer is skipped.

    It offers what SafetensorsReader offers: names (in the order of transformers), spec, shape, dtype, read, read_rows. So
    `MegatronActor.load_hugging_face(weights.read)` starts an actor of any layout from it.

    Opening raises ValueError, naming file and tensor, for a parameter of the architecture that the checkpoint lacks, a tensor of
    another shape, and a tensor that no parameter is made of; and as TorchDistReader does.
    """

    def __init__(self, directory: str | Path, architecture: Architecture) -> None:
        self.directory = Path(directory)
        self._reader = TorchDistReader(directory)
        try:
            self._tensors = self._find(architecture)
        except BaseException:
            self.close()
            raise

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the tensors."""
        return self._reader.files

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def file(self, name: str) -> Path:
        """What names the tensor's place in errors: the folder, as a tensor is spread over its files."""
        return self.directory

    def spec(self, name: str) -> TensorSpec:
        return self._tensor(name).spec

    def shape(self, name: str) -> Shape:
        return self._tensor(name).spec.shape

    def dtype(self, name: str) -> torch.dtype:
        return self._tensor(name).spec.dtype

    def read(self, name: str) -> Tensor:
        """A whole tensor, on the CPU, contiguous."""
        return self.read_rows(name, 0, self._tensor(name).spec.shape[0])

    def read_rows(self, name: str, start: int, end: int) -> Tensor:
        """Rows start to end - 1 along dim 0, on the CPU, contiguous. Raises ValueError for rows that do not exist."""
        tensor = self._tensor(name)
        shape = tensor.spec.shape
        if not 0 <= start <= end <= shape[0]:
            raise ValueError(f"{self.directory}: rows {start} to {end} of {name} asked for; expected rows inside its shape {shape}")
        pieces: list[Tensor] = []
        for run in tensor.runs:
            low, high = max(start, run.hf_row), min(end, run.hf_row + run.num_rows)
            if low < high:
                first = low - run.hf_row + run.megatron_row
                pieces += self._rows_of(tensor.places, first, first + high - low, shape[1:])
        if not pieces:
            return torch.empty((0, *shape[1:]), dtype=tensor.spec.dtype)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def close(self) -> None:
        self._reader.close()

    def __enter__(self) -> MegatronWeights:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _tensor(self, name: str) -> _HuggingFaceTensor:
        if name not in self._tensors:
            raise ValueError(f"{self.directory}: has no tensor {name!r}; expected one of the {len(self._tensors)} of its architecture")
        return self._tensors[name]

    def _rows_of(self, places: tuple[_Place, ...], start: int, end: int, row_shape: Shape) -> Iterator[Tensor]:
        for place in places:
            low, high = max(start, place.first_row), min(end, place.first_row + place.num_rows)
            if low < high:
                box_start = (*place.index, low - place.first_row, *(0 for _ in row_shape))
                box = self._reader.read_box(place.key, box_start, (*(1 for _ in place.index), high - low, *row_shape))
                yield box.view(high - low, *row_shape)

    def _find(self, architecture: Architecture) -> dict[str, _HuggingFaceTensor]:
        present = set(self._reader.names)
        prefix = self._prefix()
        tensors: dict[str, _HuggingFaceTensor] = {}
        used: set[str] = set()
        for parameter in parameters(architecture):
            found = list(_places(parameter, prefix, present, architecture))
            if not found:
                wanted = prefix + parameter.torch_dist_names[0]
                raise ValueError(f"{self.directory}: {parameter.megatron_name} is missing; expected the tensor {wanted!r}")
            for places in found:
                self._check(parameter, places)
                used.update(place.key for place in places)
            self._check_aliases(parameter, found)
            dtype = self._reader.dtype(found[0][0].key)
            for name, shape, runs in zip(parameter.hf_names, parameter.hf_shapes, parameter.row_runs(), strict=True):
                tensors[name] = _HuggingFaceTensor(TensorSpec(name, shape, dtype), runs, found[0])
        unknown = sorted(present - used)
        if unknown:
            raise ValueError(
                f"{self.directory}: holds {len(unknown)} tensors that no {architecture.model_type} model has, the first: {unknown[:3]}; "
                "expected the parameters of config.json's model"
            )
        return tensors

    def _prefix(self) -> str:
        found = [name.removesuffix(_EMBEDDING) for name in self._reader.names if name.endswith(_EMBEDDING)]
        if len(found) != 1:
            raise ValueError(f"{self.directory}: {len(found)} tensors end in {_EMBEDDING} {found[:3]}; expected one model")
        return found[0]

    def _check(self, parameter: Parameter, places: tuple[_Place, ...]) -> None:
        """Each saved tensor has the shape that the architecture gives it, and one dtype; only the vocabulary may be longer."""
        for place in places:
            saved, dtype = self._reader.shape(place.key), self._reader.dtype(place.key)
            expected = (*place.stacked, place.num_rows, *parameter.megatron_shape[1:])
            padded = place.key.endswith(_PADDED) and len(saved) == len(expected) and saved[0] >= expected[0]
            if saved[1 if padded else 0 :] != expected[1 if padded else 0 :]:
                raise ValueError(f"{self.directory}: shape of {place.key!r} is {saved}; expected {expected} from the config")
            if dtype != self._reader.dtype(places[0].key):
                raise ValueError(f"{self.directory}: dtype of {place.key!r} is {dtype}; expected that of {places[0].key!r}")

    def _check_aliases(self, parameter: Parameter, found: list[tuple[_Place, ...]]) -> None:
        """A norm may be saved under the names of both layer specs; then both must be equal, or it is unknown which one is meant."""
        if len(found) == 1:
            return
        rows, row_shape = parameter.megatron_shape[0], parameter.megatron_shape[1:]
        first, *others = [torch.cat(list(self._rows_of(places, 0, rows, row_shape))) for places in found]
        for places, other in zip(found[1:], others, strict=True):
            if not torch.equal(first.view(torch.uint8), other.view(torch.uint8)):
                raise ValueError(
                    f"{self.directory}: {parameter.megatron_name} is saved as {found[0][0].key!r} and, with other values, as "
                    f"{places[0].key!r}; expected one of them, or equal ones"
                )


def _places(parameter: Parameter, prefix: str, present: set[str], architecture: Architecture) -> Iterator[tuple[_Place, ...]]:
    """Everywhere a parameter is saved: under each of its names, with the layer and the expert stacked or numbered."""
    layers = _spellings("decoder.layers.", parameter.layer, architecture.num_hidden_layers)
    experts = _spellings(".experts.experts.", parameter.expert, architecture.num_experts)
    rows = parameter.megatron_shape[0]
    for name in dict.fromkeys(
        (*parameter.torch_dist_names, _NUMBERED_EXPERT.sub(".experts.", _NUMBERED_LAYER.sub(".", parameter.megatron_name)))
    ):
        for layer_text, layer_index, num_layers in layers:
            for expert_text, expert_index, num_experts in experts:
                key = prefix + name.replace("decoder.layers.", layer_text).replace(".experts.experts.", expert_text)
                index, stacked = (*layer_index, *expert_index), (*num_layers, *num_experts)
                if key in present:
                    yield (_Place(key, index, stacked, 0, rows),)
                gate, up = f"{key}_w", f"{key}_v"
                if parameter.split is Split.GATED_ROWS and gate in present and up in present:
                    half = rows // 2
                    yield (_Place(gate, index, stacked, 0, half), _Place(up, index, stacked, half, half))


def _spellings(text: str, number: int | None, count: int | None) -> list[tuple[str, Shape, Shape]]:
    """How a key says which layer (or expert): text of the key, index along a stacked axis, length of that axis."""
    if number is None or count is None:
        return [(text, (), ())]
    return [(text, (number,), (count,)), (f"{text}{number}.", (), ())]
