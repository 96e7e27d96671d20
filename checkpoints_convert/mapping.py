"""The one table of tensor names, shapes and layouts: Hugging Face Qwen3 / Qwen3-MoE <-> Megatron-Core.

Used by the converter, by the actor when it loads, and by the weight sync when it exports. Each row states one Megatron parameter
(the name it has in a GPTModel built from the local layer spec with SequentialMLP experts), the Hugging Face tensors that it is made
of, its shape, and how tensor parallelism cuts it. Adding a model family means adding rows.

    Megatron fused QKV rows, G key-value heads (groups), r query heads per group, D = head_dim:
        [group 0: r*D query rows, D key rows, D value rows][group 1: ...] ... [group G-1: ...]
    Megatron fused gate and up rows, F = feed-forward width:  [F gate rows][F up rows]
"""

# Shapes: Q query rows (heads x head_dim), K key or value rows, G key-value heads, R query heads per group, D head_dim, H input width.

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from checkpoints_convert.hf_config import Architecture
from checkpoints_convert.nearest_name import closest

Shape = tuple[int, ...]


class Split(Enum):
    """How tensor parallelism of some size n cuts a full Megatron parameter into n shards."""

    REPLICATED = "replicated"  # every rank holds all of it
    ROWS = "rows"  # dim 0 in n equal parts
    COLUMNS = "columns"  # dim 1 in n equal parts
    QKV_ROWS = "qkv_rows"  # dim 0 in n equal parts, each a whole number of key-value groups
    GATED_ROWS = "gated_rows"  # the gate half and the up half of dim 0 are each cut in n; a shard is [its gate rows][its up rows]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rename:
    """One Hugging Face tensor, unchanged. `shape` names dimensions (see `_dimensions`)."""

    megatron: str
    hf: str
    shape: tuple[str, ...]
    split: Split
    torch_dist: tuple[str, ...] = ()  # saved keys, where they are not the name without its numbers; the first is preferred


@dataclass(frozen=True, slots=True, kw_only=True)
class FuseQKV:
    """Query, key and value projections, interleaved by key-value group."""

    megatron: str
    hf: tuple[str, str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class FuseGateUp:
    """Gate and up projections, gate rows first. `rows` names the dimension that each of the two has as its rows."""

    megatron: str
    hf: tuple[str, str]
    rows: str


Row = Rename | FuseQKV | FuseGateUp

# The order of the tables, and of the rows inside, is the order in which transformers lists a model's weights. Shards are filled in
# that order, so keeping it makes the files of a converted checkpoint equal to the published ones.
_EMBEDDING: tuple[Row, ...] = (
    Rename(megatron="embedding.word_embeddings.weight", hf="model.embed_tokens.weight", shape=("vocab", "hidden"), split=Split.ROWS),
)
_ATTENTION: tuple[Row, ...] = (
    FuseQKV(
        megatron="decoder.layers.{layer}.self_attention.linear_qkv.weight",
        hf=(
            "model.layers.{layer}.self_attn.q_proj.weight",
            "model.layers.{layer}.self_attn.k_proj.weight",
            "model.layers.{layer}.self_attn.v_proj.weight",
        ),
    ),
    Rename(
        megatron="decoder.layers.{layer}.self_attention.linear_proj.weight",
        hf="model.layers.{layer}.self_attn.o_proj.weight",
        shape=("hidden", "query"),
        split=Split.COLUMNS,
    ),
    Rename(
        megatron="decoder.layers.{layer}.self_attention.q_layernorm.weight",
        hf="model.layers.{layer}.self_attn.q_norm.weight",
        shape=("head",),
        split=Split.REPLICATED,
    ),
    Rename(
        megatron="decoder.layers.{layer}.self_attention.k_layernorm.weight",
        hf="model.layers.{layer}.self_attn.k_norm.weight",
        shape=("head",),
        split=Split.REPLICATED,
    ),
)
_DENSE_MLP: tuple[Row, ...] = (
    FuseGateUp(
        megatron="decoder.layers.{layer}.mlp.linear_fc1.weight",
        hf=("model.layers.{layer}.mlp.gate_proj.weight", "model.layers.{layer}.mlp.up_proj.weight"),
        rows="ffn",
    ),
    Rename(
        megatron="decoder.layers.{layer}.mlp.linear_fc2.weight",
        hf="model.layers.{layer}.mlp.down_proj.weight",
        shape=("hidden", "ffn"),
        split=Split.COLUMNS,
    ),
)
_ROUTER: tuple[Row, ...] = (
    Rename(
        megatron="decoder.layers.{layer}.mlp.router.weight",
        hf="model.layers.{layer}.mlp.gate.weight",
        shape=("experts", "hidden"),
        split=Split.REPLICATED,
    ),
)
_EXPERT: tuple[Row, ...] = (
    FuseGateUp(
        megatron="decoder.layers.{layer}.mlp.experts.local_experts.{expert}.linear_fc1.weight",
        hf=(
            "model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight",
            "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight",
        ),
        rows="expert_ffn",
    ),
    Rename(
        megatron="decoder.layers.{layer}.mlp.experts.local_experts.{expert}.linear_fc2.weight",
        hf="model.layers.{layer}.mlp.experts.{expert}.down_proj.weight",
        shape=("hidden", "expert_ffn"),
        split=Split.COLUMNS,
    ),
)
_INPUT_NORM = Rename(
    megatron="decoder.layers.{layer}.input_layernorm.weight",
    hf="model.layers.{layer}.input_layernorm.weight",
    shape=("hidden",),
    split=Split.REPLICATED,
    torch_dist=("decoder.layers.self_attention.linear_qkv.layer_norm_weight",),
)
_DENSE_NORMS: tuple[Row, ...] = (
    _INPUT_NORM,
    Rename(
        megatron="decoder.layers.{layer}.pre_mlp_layernorm.weight",
        hf="model.layers.{layer}.post_attention_layernorm.weight",
        shape=("hidden",),
        split=Split.REPLICATED,
        torch_dist=("decoder.layers.mlp.linear_fc1.layer_norm_weight",),
    ),
)
_MOE_NORMS: tuple[Row, ...] = (
    _INPUT_NORM,
    Rename(
        megatron="decoder.layers.{layer}.pre_mlp_layernorm.weight",
        hf="model.layers.{layer}.post_attention_layernorm.weight",
        shape=("hidden",),
        split=Split.REPLICATED,
        # The TransformerEngine spec saves it under the first key, the local spec under the second.
        torch_dist=("decoder.layers.pre_mlp_layernorm.weight", "decoder.layers.mlp.linear_fc1.layer_norm_weight"),
    ),
)
_FINAL_NORM: tuple[Row, ...] = (
    Rename(megatron="decoder.final_layernorm.weight", hf="model.norm.weight", shape=("hidden",), split=Split.REPLICATED),
)
_HEAD: tuple[Row, ...] = (Rename(megatron="output_layer.weight", hf="lm_head.weight", shape=("vocab", "hidden"), split=Split.ROWS),)

# A tied model has no head of its own, yet published ones (Qwen3-0.6B) store a copy of the embedding under the head's name.
TIED_COPIES: Mapping[str, str] = {"lm_head.weight": "model.embed_tokens.weight"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchDistKey:
    """Where a Megatron torch_dist checkpoint keeps one parameter.

    Layers are stacked along dim 0 of the saved tensor and experts along dim 1, so the parameter is `saved[index]`. `names[0]` is the
    preferred name; the others are what the same tensor is called under another layer spec.
    """

    names: tuple[str, ...]
    index: tuple[int, ...]


class RowRun(NamedTuple):
    """Rows that are neighbours, in the same order, in a Hugging Face tensor and in the Megatron tensor made of it."""

    hf_row: int
    megatron_row: int
    num_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One parameter of a Megatron GPTModel, with the layer and the expert numbered globally, and its Hugging Face counterpart."""

    megatron_name: str  # decoder.layers.3.mlp.experts.local_experts.17.linear_fc1.weight
    megatron_shape: Shape  # full, before tensor parallelism
    hf_names: tuple[str, ...]
    hf_shapes: tuple[Shape, ...]
    split: Split
    is_expert: bool  # True: cut by expert tensor parallelism (etp) and placed by expert parallelism (ep), not by tp
    layer: int | None
    expert: int | None
    num_groups: int  # key-value heads; what QKV_ROWS may not cut through
    torch_dist_names: tuple[str, ...]

    def from_hf(self, tensors: Sequence[Tensor]) -> Tensor:
        """Full Megatron tensor from the Hugging Face tensors, in the order of `hf_names`. Bit-exact; may share memory with its input.

        Raises ValueError with the tensor's name when a count, a shape or a dtype is not what the architecture says.
        """
        if len(tensors) != len(self.hf_names):
            raise ValueError(f"{self.megatron_name}: made of {len(tensors)} tensors; expected {self.hf_names}")
        for name, shape, tensor in zip(self.hf_names, self.hf_shapes, tensors, strict=True):
            _require_shape(name, tensor, shape)
            if tensor.dtype != tensors[0].dtype:  # torch.cat would promote, and so round, in silence
                raise ValueError(f"{name}: dtype is {tensor.dtype}; expected {tensors[0].dtype}, the dtype of {self.hf_names[0]}")
        if self.split is Split.QKV_ROWS:
            return fuse_qkv(*tensors, num_groups=self.num_groups)
        if self.split is Split.GATED_ROWS:
            return torch.cat(list(tensors))
        return tensors[0]

    def to_hf(self, tensor: Tensor) -> list[Tensor]:
        """The Hugging Face tensors, in the order of `hf_names`, from the full Megatron tensor: the inverse of `from_hf`, bit for bit.

        The result may share memory with `tensor` and is not always contiguous. Raises ValueError for another shape.
        """
        _require_shape(self.megatron_name, tensor, self.megatron_shape)
        if self.split is Split.QKV_ROWS:
            return list(unfuse_qkv(tensor, num_groups=self.num_groups, head_dim=self.hf_shapes[1][0] // self.num_groups))
        if self.split is Split.GATED_ROWS:
            return list(tensor.chunk(2))
        return [tensor]

    def row_runs(self) -> tuple[tuple[RowRun, ...], ...]:
        """Per Hugging Face tensor, in the order of its rows, where they lie in the Megatron tensor. What `from_hf` does, in small steps."""
        if self.split is Split.QKV_ROWS:
            rows = [shape[0] // self.num_groups for shape in self.hf_shapes]  # of each projection in one group
            first = [sum(rows[:i]) for i in range(len(rows))]
            return tuple(
                tuple(RowRun(group * count, group * sum(rows) + start, count) for group in range(self.num_groups))
                for start, count in zip(first, rows, strict=True)
            )
        starts = [sum(shape[0] for shape in self.hf_shapes[:i]) for i in range(len(self.hf_shapes))]
        return tuple((RowRun(0, start, shape[0]),) for start, shape in zip(starts, self.hf_shapes, strict=True))

    def shard_shape(self, size: int) -> Shape:
        """Shape of one of `size` tensor-parallel shards. Raises ValueError when the parameter cannot be cut in `size` equal parts."""
        if size < 1:
            raise ValueError(f"{self.megatron_name}: tensor-parallel size is {size}; expected at least 1")
        if self.split is Split.REPLICATED:
            return self.megatron_shape
        axis = 1 if self.split is Split.COLUMNS else 0
        pieces = {Split.QKV_ROWS: self.num_groups, Split.GATED_ROWS: self.megatron_shape[0] // 2}.get(self.split, self.megatron_shape[axis])
        if pieces % size:
            unit = "key-value heads" if self.split is Split.QKV_ROWS else self.split.value
            raise ValueError(f"{self.megatron_name}: {pieces} {unit} cannot be cut in {size} equal shards; expected a divisor of {pieces}")
        return tuple(length // size if dim == axis else length for dim, length in enumerate(self.megatron_shape))

    def shard(self, full: Tensor, rank: int, size: int) -> Tensor:
        """Shard `rank` of `size` of the full Megatron tensor. May share memory with `full`; not always contiguous.

        rank, size: tp for most parameters, etp where `is_expert`. Raises ValueError for a wrong shape, rank or size.
        """
        _require_shape(self.megatron_name, full, self.megatron_shape)
        self.shard_shape(size)
        if not 0 <= rank < size:
            raise ValueError(f"{self.megatron_name}: rank is {rank}; expected 0 to {size - 1}")
        if self.split is Split.REPLICATED or size == 1:
            return full
        if self.split is Split.COLUMNS:
            return full.chunk(size, dim=1)[rank]
        if self.split is Split.GATED_ROWS:
            gate, up = full.chunk(2)
            return torch.cat([gate.chunk(size)[rank], up.chunk(size)[rank]])
        return full.chunk(size)[rank]

    def unshard(self, shards: Sequence[Tensor]) -> Tensor:
        """The full Megatron tensor from all its shards in rank order: the inverse of `shard`, bit for bit.

        Raises ValueError for a wrong shape, unequal dtypes, and copies of a replicated parameter that differ in any bit.
        """
        shape = self.shard_shape(len(shards))
        for shard in shards:
            _require_shape(self.megatron_name, shard, shape)
            if shard.dtype != shards[0].dtype:
                raise ValueError(f"{self.megatron_name}: shards are {shard.dtype} and {shards[0].dtype}; expected one dtype")
        if self.split is Split.REPLICATED:
            for rank, copy in enumerate(shards[1:], start=1):
                if not torch.equal(copy.contiguous().view(torch.uint8), shards[0].contiguous().view(torch.uint8)):
                    raise ValueError(f"{self.megatron_name}: rank {rank} of {len(shards)} differs from rank 0; expected equal copies")
            return shards[0]
        if len(shards) == 1:
            return shards[0]
        if self.split is Split.GATED_ROWS:
            halves = [shard.chunk(2) for shard in shards]
            return torch.cat([gate for gate, _ in halves] + [up for _, up in halves])
        return torch.cat(list(shards), dim=1 if self.split is Split.COLUMNS else 0)


def fuse_qkv(query_QH: Tensor, key_KH: Tensor, value_KH: Tensor, *, num_groups: int) -> Tensor:
    """Interleave the projections by key-value group: [Q, H], [K, H], [K, H] -> [Q + 2K, H], layout in the module docstring."""
    parts_GxH = [tensor.unflatten(0, (num_groups, -1)) for tensor in (query_QH, key_KH, value_KH)]
    return torch.cat(parts_GxH, dim=1).flatten(0, 1)


def unfuse_qkv(fused_XH: Tensor, *, num_groups: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inverse of `fuse_qkv`: [Q + 2K, H] -> [Q, H], [K, H], [K, H]."""
    fused_GxH = fused_XH.unflatten(0, (num_groups, -1))
    query_rows = fused_GxH.shape[1] - 2 * head_dim
    query_GxH, key_GDH, value_GDH = fused_GxH.split([query_rows, head_dim, head_dim], dim=1)
    return query_GxH.flatten(0, 1), key_GDH.flatten(0, 1), value_GDH.flatten(0, 1)


def parameters(architecture: Architecture) -> Iterator[Parameter]:
    """Every parameter of the model once, in canonical order: embedding, layers in order, final norm, head (unless tied).

    Inside a layer: attention, router, experts in order (or the dense feed-forward part), the two norms. The `hf_names` of all of
    them, in this order, are the model's weights in the order of transformers.
    """
    yield from _rows(_EMBEDDING, architecture)
    for layer in range(architecture.num_hidden_layers):
        yield from _rows(_ATTENTION, architecture, layer=layer)
        if architecture.num_experts is None:
            yield from _rows(_DENSE_MLP, architecture, layer=layer)
            yield from _rows(_DENSE_NORMS, architecture, layer=layer)
        else:
            yield from _rows(_ROUTER, architecture, layer=layer)
            for expert in range(architecture.num_experts):
                yield from _rows(_EXPERT, architecture, layer=layer, expert=expert)
            yield from _rows(_MOE_NORMS, architecture, layer=layer)
    yield from _rows(_FINAL_NORM, architecture)
    if not architecture.tie_word_embeddings:
        yield from _rows(_HEAD, architecture)


def hf_shapes(architecture: Architecture) -> dict[str, Shape]:
    """Name and shape of every Hugging Face tensor, in the order of transformers."""
    return {
        name: shape for parameter in parameters(architecture) for name, shape in zip(parameter.hf_names, parameter.hf_shapes, strict=True)
    }


def check_hf_tensors(architecture: Architecture, shapes: Mapping[str, Shape], *, source: str | Path) -> tuple[str, ...]:
    """Compare the tensors of a Hugging Face checkpoint with the architecture: every one known, none missing, each of the right shape.

    Returns the stored copies of tied tensors (keys of TIED_COPIES; usually none): the caller must find them equal to what they copy.
    Raises ValueError naming the source and the first tensors of each kind of disagreement.
    """
    expected = hf_shapes(architecture)
    copies = tuple(name for name in TIED_COPIES if name in shapes and name not in expected)
    for name in copies:
        expected[name] = expected[TIED_COPIES[name]]
    missing = [name for name in expected if name not in shapes and name not in copies]
    extra = [name for name in shapes if name not in expected]
    if missing or extra:
        near = closest(missing[0], extra) if missing else None
        hint = f"; {missing[0]} may be called {near} here" if near is not None else ""
        raise ValueError(
            f"{source}: expected the {len(expected)} tensors of {architecture.model_type}; "
            f"missing {len(missing)}: {missing[:3]}, not known {len(extra)}: {extra[:3]}{hint}"
        )
    for name, shape in expected.items():
        if tuple(shapes[name]) != shape:
            raise ValueError(f"{source}: shape of {name} is {tuple(shapes[name])}; expected {shape} from the config")
    return copies


def torch_dist_key(parameter: Parameter) -> TorchDistKey:
    """Key of a parameter in a Megatron torch_dist checkpoint, and its index along the stacked layer and expert axes.

    For `decoder.layers.3.mlp.experts.local_experts.17.linear_fc1.weight` the key is
    `decoder.layers.mlp.experts.experts.linear_fc1.weight` and the index (3, 17).
    """
    index = tuple(number for number in (parameter.layer, parameter.expert) if number is not None)
    return TorchDistKey(names=parameter.torch_dist_names, index=index)


def _rows(rows: tuple[Row, ...], architecture: Architecture, *, layer: int | None = None, expert: int | None = None) -> Iterator[Parameter]:
    dimensions = _dimensions(architecture)
    for row in rows:
        torch_dist_names: tuple[str, ...] = ()
        if isinstance(row, FuseQKV):
            hf_names: tuple[str, ...] = row.hf
            shapes: tuple[Shape, ...] = tuple((dimensions[rows], dimensions["hidden"]) for rows in ("query", "key", "key"))
            split = Split.QKV_ROWS
        elif isinstance(row, FuseGateUp):
            hf_names = row.hf
            shapes = ((dimensions[row.rows], dimensions["hidden"]),) * 2
            split = Split.GATED_ROWS
        else:
            hf_names = (row.hf,)
            shapes = (tuple(dimensions[name] for name in row.shape),)
            split = row.split
            torch_dist_names = row.torch_dist
        if not torch_dist_names:
            torch_dist_names = (row.megatron.replace("layers.{layer}.", "layers.").replace("local_experts.{expert}.", "experts."),)
        numbers = {"layer": layer, "expert": expert}
        yield Parameter(
            megatron_name=row.megatron.format(**numbers),
            megatron_shape=(sum(shape[0] for shape in shapes), *shapes[0][1:]),
            hf_names=tuple(name.format(**numbers) for name in hf_names),
            hf_shapes=shapes,
            split=split,
            is_expert=expert is not None,
            layer=layer,
            expert=expert,
            num_groups=architecture.num_key_value_heads,
            torch_dist_names=torch_dist_names,
        )


def _dimensions(architecture: Architecture) -> dict[str, int]:
    dimensions = {
        "vocab": architecture.vocab_size,
        "hidden": architecture.hidden_size,
        "head": architecture.head_dim,
        "query": architecture.num_attention_heads * architecture.head_dim,
        "key": architecture.num_key_value_heads * architecture.head_dim,
        "ffn": architecture.intermediate_size,
    }
    if architecture.num_experts is not None and architecture.moe_intermediate_size is not None:
        dimensions |= {"experts": architecture.num_experts, "expert_ffn": architecture.moe_intermediate_size}
    return dimensions


def _require_shape(name: str, tensor: Tensor, shape: Shape) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: shape is {tuple(tensor.shape)}; expected {shape}")
