"""What a Hugging Face config.json says about the shape of a Qwen3 or Qwen3-MoE model, in either spelling, with nothing guessed.

transformers 4 and 5 name three things differently: num_experts / num_local_experts, rope_theta / rope_parameters.rope_theta and
torch_dtype / dtype. Each version reads the other's file without an error and builds another model (version 4 falls back to
rope_theta 10,000 for a file that version 5 wrote), so both spellings are read here, must agree, and are both written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from checkpoints_convert.adapters import refuse_adapter
from checkpoints_convert.other_formats import found_instead

_CLASS_NAMES: Mapping[str, str] = {"qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
MODEL_TYPES = tuple(_CLASS_NAMES)

DTYPE_NAMES = ("float32", "float16", "bfloat16")  # dtypes.py has the torch dtypes; this file does without torch

# Keys that would change what the model computes, with the values under which they change nothing. Absence changes nothing either:
# transformers then uses one of these values, or knows no such key for these models.
_INERT_VALUES: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0.0, None),
    "use_sliding_window": (False, None),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([], None),
    "shared_expert_intermediate_size": (0, None),
    "num_shared_experts": (0, None),
    "n_shared_experts": (0, None),
    "first_k_dense_replace": (0, None),
    "num_nextn_predict_layers": (0, None),
    "partial_rotary_factor": (1.0, None),
    "quantization_config": (None,),
}

# Further keys of published config.json files, in either spelling.
_OTHER_KEYS = (
    *("architectures", "transformers_version", "torch_dtype", "num_local_experts", "layer_types"),
    *("rope_parameters", "rope_scaling", "initializer_range", "router_aux_loss_coef", "output_router_logits"),
    *("use_cache", "sliding_window", "max_window_layers", "bos_token_id", "eos_token_id", "pad_token_id"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The shape of a Qwen3 (dense) or Qwen3-MoE model. Every layer is alike: all dense, or all experts.

    Names are those of config.json. `num_experts`, `num_experts_per_tok`, `moe_intermediate_size` and `norm_topk_prob` are None
    exactly when the model is dense; `dtype` is None when config.json names none.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int  # feed-forward width of a dense layer; unused by a Mixture-of-Experts model
    num_experts: int | None
    num_experts_per_tok: int | None
    moe_intermediate_size: int | None
    norm_topk_prob: bool | None  # True: the weights of the chosen experts are divided by their sum
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    dtype: str | None

    @property
    def is_moe(self) -> bool:
        """True when every layer's feed-forward part is a set of routed experts."""
        return self.num_experts is not None

    @property
    def num_query_heads_per_group(self) -> int:
        """Query heads that share one key-value head."""
        return self.num_attention_heads // self.num_key_value_heads

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, source: str | Path) -> Architecture:
        """Read the parsed content of a config.json; `source` names it in errors.

        Raises ValueError (source, key, value, what was expected) for another model type, a missing or malformed key, two spellings
        that disagree, and every key whose value would change the architecture into one that the tensor table does not describe.
        """
        read = _Reader(config, str(source))
        model_type = read.choice("model_type", MODEL_TYPES)
        if config.get("architectures") not in (None, [_CLASS_NAMES[model_type]]):
            raise read.error("architectures", f"[{_CLASS_NAMES[model_type]!r}] (another class has another head, or none)")
        for key, inert in _INERT_VALUES.items():
            if key in config and config[key] not in inert:
                raise read.error(key, f"{inert[0]!r} (anything else is another architecture)")
        layer_types = config.get("layer_types")
        if layer_types is not None and any(kind != "full_attention" for kind in layer_types):
            raise read.error("layer_types", "'full_attention' for every layer")
        is_moe = model_type == "qwen3_moe"
        if not is_moe:
            for key in ("num_experts", "num_local_experts"):
                if config.get(key) is not None:
                    raise read.error(key, "no such key in a dense qwen3 model")

        hidden_size = read.positive_int("hidden_size")
        num_attention_heads = read.positive_int("num_attention_heads")
        num_key_value_heads = read.positive_int("num_key_value_heads")
        if num_attention_heads % num_key_value_heads:
            raise read.error("num_key_value_heads", f"a divisor of num_attention_heads = {num_attention_heads}")
        if is_moe and config.get("head_dim") is None:
            # transformers' Qwen3-MoE attention uses hidden_size // num_attention_heads then; dense Qwen3 always states head_dim.
            if hidden_size % num_attention_heads:
                raise read.error("head_dim", f"a positive integer, as {num_attention_heads} heads do not divide hidden_size {hidden_size}")
            head_dim = hidden_size // num_attention_heads
        else:
            head_dim = read.positive_int("head_dim")
        if head_dim % 2:
            raise read.error("head_dim", "an even number (rotary embedding turns pairs)")

        num_experts = num_experts_per_tok = moe_intermediate_size = norm_topk_prob = None
        if is_moe:
            num_experts = read.positive_int(read.agreeing("num_experts", "num_local_experts"))
            num_experts_per_tok = read.positive_int("num_experts_per_tok")
            if num_experts_per_tok > num_experts:
                raise read.error("num_experts_per_tok", f"at most the number of experts, {num_experts}")
            moe_intermediate_size = read.positive_int("moe_intermediate_size")
            norm_topk_prob = read.boolean("norm_topk_prob")
            if num_experts_per_tok == 1 and norm_topk_prob:
                # Megatron-Core has no such router.
                raise read.error(
                    "num_experts_per_tok", "at least 2, as norm_topk_prob gives a single expert weight 1 and its router no gradient"
                )

        return cls(
            model_type=model_type,
            vocab_size=read.positive_int("vocab_size"),
            hidden_size=hidden_size,
            num_hidden_layers=read.positive_int("num_hidden_layers"),
            num_attention_heads=num_attention_heads,
            num_key_value_heads=num_key_value_heads,
            head_dim=head_dim,
            intermediate_size=read.positive_int("intermediate_size"),
            num_experts=num_experts,
            num_experts_per_tok=num_experts_per_tok,
            moe_intermediate_size=moe_intermediate_size,
            norm_topk_prob=norm_topk_prob,
            rms_norm_eps=read.positive_float("rms_norm_eps"),
            rope_theta=float(read.rope_theta()),
            max_position_embeddings=read.positive_int("max_position_embeddings"),
            tie_word_embeddings=read.boolean("tie_word_embeddings"),
            dtype=read.dtype(),
        )


def known_keys() -> tuple[str, ...]:
    """Keys that a config.json of these models may have: those that are read here, and those that change nothing."""
    return (*(field.name for field in fields(Architecture)), *_INERT_VALUES, *_OTHER_KEYS)


def read_config(directory: str | Path) -> dict[str, Any]:
    """The parsed config.json of a Hugging Face model folder. Raises ValueError naming the file when absent or not a JSON object."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a Hugging Face model folder with a config.json{found_instead(path.parent)}")
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: holds a JSON {type(config).__name__}, expected an object")
    return config


def read_architecture(directory: str | Path) -> Architecture:
    """The Architecture of a Hugging Face model folder. Raises ValueError as Architecture.from_config and refuse_adapter do."""
    refuse_adapter(Path(directory))
    return Architecture.from_config(read_config(directory), source=Path(directory) / "config.json")


def config_with_both_spellings(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a config.json that transformers 4 and transformers 5 read as the same model; keys it already has keep their place.

    Raises ValueError as Architecture.from_config does: a config that we would misread is not worth completing.
    """
    architecture = Architecture.from_config(config, source="config")
    rope_theta = _Reader(config, "config").rope_theta()
    added: dict[str, Any] = {"rope_theta": rope_theta, "rope_parameters": {"rope_theta": rope_theta, "rope_type": "default"}}
    if architecture.is_moe:
        # Without head_dim transformers derives it from hidden_size; other readers have other defaults.
        added |= {"head_dim": architecture.head_dim}
        added |= {"num_experts": architecture.num_experts, "num_local_experts": architecture.num_experts}
    if architecture.dtype is not None:
        added |= {"torch_dtype": architecture.dtype, "dtype": architecture.dtype}
    complete = dict(config)
    for key, value in added.items():
        if complete.get(key) is None or (key == "rope_parameters" and "rope_theta" not in complete[key]):
            complete[key] = value
    return complete


@dataclass(frozen=True, slots=True)
class _Reader:
    """Typed look-ups in one config, with errors that name the source and the key."""

    config: Mapping[str, Any]
    source: str

    def error(self, key: str, expected: str) -> ValueError:
        found = f"{key} is {self.config[key]!r}" if key in self.config else f"{key} is missing"
        return ValueError(f"{self.source}: {found}; expected {expected}")

    def choice(self, key: str, values: tuple[str, ...]) -> str:
        value = self.config.get(key)
        if value not in values:
            raise self.error(key, " or ".join(repr(value) for value in values))
        return value

    def positive_int(self, key: str) -> int:
        value = self.config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise self.error(key, "a positive integer")
        return value

    def positive_float(self, key: str) -> float:
        value: Any = self.config.get(key)
        if not _is_positive_number(value):
            raise self.error(key, "a positive number")
        return float(value)

    def boolean(self, key: str) -> bool:
        value = self.config.get(key)
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def agreeing(self, first: str, second: str) -> str:
        """Whichever of two spellings of one key is present. Both may be, with one value."""
        if self.config.get(first) is None:
            return second if self.config.get(second) is not None else first
        if self.config.get(second) is not None and self.config[second] != self.config[first]:
            raise self.error(second, f"{first} = {self.config[first]!r}, its other spelling")
        return first

    def dtype(self) -> str | None:
        key = self.agreeing("torch_dtype", "dtype")
        if self.config.get(key) is None:
            return None
        return self.choice(key, DTYPE_NAMES)

    def rope_theta(self) -> int | float:
        """Base of the rotary embedding as it is written, from rope_theta, rope_parameters or rope_scaling; only unscaled is accepted."""
        spellings: list[tuple[str, Any]] = []
        if self.config.get("rope_theta") is not None:
            spellings.append(("rope_theta", self.config["rope_theta"]))
        for key in ("rope_parameters", "rope_scaling"):
            rope = self.config.get(key)
            if rope is None:
                continue
            kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, Mapping) else None
            others = set(rope) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"} if isinstance(rope, Mapping) else set()
            if kind != "default" or others or rope.get("partial_rotary_factor", 1.0) != 1.0:
                raise self.error(key, "an unscaled rotary embedding, {'rope_type': 'default', 'rope_theta': ...}")
            if rope.get("rope_theta") is not None:
                spellings.append((f"{key}.rope_theta", rope["rope_theta"]))
        if not spellings:
            raise self.error("rope_theta", "a positive number here or in rope_parameters.rope_theta")
        first_key, first = spellings[0]
        for key, value in spellings:
            if not _is_positive_number(value):
                raise ValueError(f"{self.source}: {key} is {value!r}; expected a positive number")
            if value != first:
                raise ValueError(f"{self.source}: {key} is {value!r}; expected {first_key} = {first!r}, its other spelling")
        return first


def _is_positive_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")
