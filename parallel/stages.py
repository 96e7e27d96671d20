"""Which layers each pipeline stage holds: Megatron-Core's rules, said once for the actor, the rehearsal and the planner."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

# Settings under which stages are even with the embedding, the head with the loss, or both of them, counted as layers.
COUNTED: tuple[Mapping[str, Any], ...] = (
    {"count_embedding_as_layer": True, "count_loss_as_layer": True},
    {"count_loss_as_layer": True},
    {"count_embedding_as_layer": True},
)
_LONGEST_LIST = 16  # of a list that an error message proposes


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A consecutive range of layers, [first, last), with what stands at the model's ends."""

    first: int
    last: int
    embeds: bool
    ends: bool  # final norm and head

    @property
    def num_layers(self) -> int:
        return self.last - self.first


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """pp * vpp chunks of layers (pp without virtual stages); rank p holds the chunks p, p + pp, p + 2 pp, ... of the model.

    Layers are dealt out evenly unless a field says otherwise:

    count_embedding_as_layer, count_loss_as_layer: the embedding takes a layer's place in the first chunk, the head with the loss in the
    last. layers_in_first_stage, layers_in_last_stage: of that rank, over all its virtual stages; the others share the rest evenly.
    layers_per_stage: of every chunk, in the model's order.
    """

    pp: int = 1
    vpp: int | None = None
    count_embedding_as_layer: bool = False
    count_loss_as_layer: bool = False
    layers_in_first_stage: int | None = None
    layers_in_last_stage: int | None = None
    layers_per_stage: tuple[int, ...] | None = None

    @property
    def num_chunks(self) -> int:
        """Chunks of the whole model."""
        return self.pp * (self.vpp or 1)

    @property
    def names_sizes(self) -> bool:
        """Whether a setting says how many layers a stage has."""
        return bool(self._given("layers_in_first_stage", "layers_in_last_stage", "layers_per_stage"))

    def chunks(self, num_layers: int) -> tuple[Chunk, ...]:
        """All chunks of a model, in its order.

        Raises ValueError when its layers cannot be dealt out like this, naming settings with which they could.
        """
        try:
            return _in_order(self._sizes(num_layers))
        except _DoesNotDivideError as error:
            found = [_as_written(way) for way in alternatives(num_layers, pp=self.pp, vpp=self.vpp)]
            advice = f"; set {' or '.join(found[:2])}" if found else ""
            raise ValueError(f"{error}{advice}") from None

    def fits(self, num_layers: int) -> bool:
        """Whether a model of so many layers can be dealt out like this."""
        try:
            self.check_stages()
            self._sizes(num_layers)
        except ValueError:
            return False
        return True

    def chunks_of_rank(self, num_layers: int, pp_rank: int) -> tuple[Chunk, ...]:
        """The chunks of one pipeline rank, one per virtual stage."""
        return self.chunks(num_layers)[pp_rank :: self.pp]

    def check_stages(self) -> None:
        """Raises ValueError for settings that contradict each other, whatever the model."""
        counts = self._given("count_embedding_as_layer", "count_loss_as_layer")
        sizes = self._given("layers_in_first_stage", "layers_in_last_stage")
        listed = self.layers_per_stage
        if listed is not None:
            others = " and ".join([*counts, *sizes])
            _require(not others, f"layers_per_stage cannot be combined with {others}; leave one out")
            _require(
                len(listed) == self.num_chunks,
                f"layers_per_stage={list(listed)} has {len(listed)} numbers, expected {self._chunks_text()}",
            )
            inner = listed[1:-1]
            _require(
                min(listed) >= 0 and 0 not in inner,
                f"layers_per_stage={list(listed)}: expected at least 1 layer; 0 is possible beside the embedding and beside the loss alone",
            )
        _require(not (counts and sizes), f"{' and '.join(sizes)} cannot be combined with {' and '.join(counts)}; leave one out")
        for name in sizes:
            size = getattr(self, name)
            _require(size >= 1, f"{name}={size} must be at least 1")
            _require(self.pp > 1, f"{name}={size} needs pp >= 2, not pp={self.pp}")
            _require(size % (self.vpp or 1) == 0, f"vpp={self.vpp} does not divide {name}={size}")

    def _given(self, *names: str) -> list[str]:
        return [name for name in names if getattr(self, name) not in (None, False)]

    def _chunks_text(self) -> str:
        return f"pp*vpp={self.num_chunks}" if self.vpp else f"pp={self.num_chunks}"

    def _sizes(self, num_layers: int) -> tuple[int, ...]:
        """Layers of every chunk. A rank without any layer would have no experts, and its optimizer none to wait for those of others."""
        sizes = self.layers_per_stage
        if sizes is not None:
            _require(sum(sizes) == num_layers, f"layers_per_stage adds up to {sum(sizes)} layers, expected {num_layers}")
        elif self._given("layers_in_first_stage", "layers_in_last_stage"):
            sizes = self._sizes_between_ends(num_layers)
        else:
            sizes = self._even_sizes(num_layers)
        empty = [rank for rank in range(self.pp) if not any(sizes[rank :: self.pp])]
        _require(not empty, f"stage {empty[0] if empty else 0} of pp={self.pp} would hold none of the {num_layers} layers")
        return sizes

    def _even_sizes(self, num_layers: int) -> tuple[int, ...]:
        counted = num_layers + self.count_embedding_as_layer + self.count_loss_as_layer
        each, rest = divmod(counted, self.num_chunks)
        if rest:
            names = ["the embedding"] * self.count_embedding_as_layer + ["the loss"] * self.count_loss_as_layer
            what = f"{num_layers} layers" + "".join(f" and {name}" for name in names)
            raise _DoesNotDivideError(f"parallel: {self._chunks_text()} does not divide {what}")
        sizes = [each] * self.num_chunks
        sizes[0] -= self.count_embedding_as_layer
        sizes[-1] -= self.count_loss_as_layer
        return tuple(sizes)

    def _sizes_between_ends(self, num_layers: int) -> tuple[int, ...]:
        first, last, vpp = self.layers_in_first_stage, self.layers_in_last_stage, self.vpp or 1
        given = [size for size in (first, last) if size is not None]
        ranks, layers = self.pp - len(given), num_layers - sum(given)
        names = " and ".join(f"{name}={getattr(self, name)}" for name in self._given("layers_in_first_stage", "layers_in_last_stage"))
        fits = layers == 0 if ranks == 0 else layers > 0 and layers % (ranks * vpp) == 0
        _require(fits, f"{layers} of {num_layers} layers are left by {names}, expected {_expected(ranks, vpp)}")
        middle = layers // ranks if ranks else 0
        of_rank = [*([] if first is None else [first]), *[middle] * ranks, *([] if last is None else [last])]
        return tuple(size // vpp for size in of_rank) * vpp


def alternatives(num_layers: int, *, pp: int, vpp: int | None) -> Iterator[Mapping[str, Any]]:
    """Settings that deal out layers which stages do not divide: Megatron-Core's own rules first, a list last.

    A first or last stage of its own size gets fewer layers than the others: the embedding and the loss take time as well.
    """
    ways = [*COUNTED]
    most = num_layers // pp
    ways += [
        {name: size}
        for name in ("layers_in_last_stage", "layers_in_first_stage")
        for size in range(most, max(0, most - 2 * (vpp or 1)), -1)
    ]
    count = pp * (vpp or 1)
    if count <= min(num_layers, _LONGEST_LIST):
        least, more = divmod(num_layers, count)
        start = (count - more) // 2  # the longer ones in the middle
        ways.append({"layers_per_stage": tuple(least + (start <= index < start + more) for index in range(count))})
    for way in ways:
        if Pipeline(pp=pp, vpp=vpp, **way).fits(num_layers):
            yield way


@lru_cache
def _in_order(sizes: tuple[int, ...]) -> tuple[Chunk, ...]:
    starts = [0, *accumulate(sizes)]
    return tuple(
        Chunk(first=start, last=start + size, embeds=index == 0, ends=index == len(sizes) - 1)
        for index, (start, size) in enumerate(zip(starts, sizes, strict=False))
    )


class _DoesNotDivideError(ValueError):
    """Layers that other settings may deal out."""


def _expected(ranks: int, vpp: int) -> str:
    if ranks == 0:
        return "none, since there are no other stages"
    return f"a multiple of {ranks * vpp}, at least one for each of the other {'virtual ' if vpp > 1 else ''}stages"


def _as_written(settings: Mapping[str, Any]) -> str:
    """As on the command line."""
    return " ".join(f"parallel.{name}={_value(value)}" for name, value in settings.items())


def _value(value: object) -> str:
    return f"[{','.join(map(str, value))}]" if isinstance(value, Sequence) and not isinstance(value, str) else str(value).lower()


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"parallel: {message}")
