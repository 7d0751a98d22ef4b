"""The shapes and constants of a decoder model, as data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from paceline.errors import BadWeights, ConfigError


@dataclass(frozen=True)
class RopeScaling:
    """A declared stretch of the rotary frequencies; all but `kind` and `divisors` as in transformers.

    `kind` is linear, llama3, yarn, or divided: each frequency by its own of the `divisors`.
    """

    kind: str
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True
    divisors: tuple[float, ...] = ()


@dataclass(frozen=True)
class Experts:
    """The mixture of experts in the layers whose numbers are in `layers`; the other layers have a dense MLP.

    Each token takes `num_active` of `num_experts` gated MLPs of `intermediate_size`. `renormalise` makes the shares of those
    taken add up to 1.
    """

    num_experts: int
    num_active: int
    intermediate_size: int
    renormalise: bool
    layers: frozenset[int]

    def __post_init__(self) -> None:
        """Raises BadWeights for counts that no model can have."""
        for name in ("num_experts", "num_active", "intermediate_size"):
            _check_count(f"experts' {name}", getattr(self, name))
        if self.num_active > self.num_experts:
            raise BadWeights(
                f"this model cannot be computed: a token takes {self.num_active} of {self.num_experts} experts"
            )


@dataclass(frozen=True)
class Shard:
    """One of `size` tensor-parallel parts of a model: heads and MLP rows are split evenly, in order of rank."""

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ConfigError(f"there is no shard {self.rank} of {self.size}")

    def part(self, count: int) -> slice:
        """This shard's part of `count` rows (or columns), which `size` divides."""
        each = count // self.size
        return slice(self.rank * each, (self.rank + 1) * each)


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and constants of one decoder. `family` names its row in `models.families`."""

    family: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_positions: int
    tie_embeddings: bool
    attention_bias: bool
    qk_norm: bool
    eos_tokens: tuple[int, ...]
    bos_token: int | None
    experts: Experts | None = None

    def __post_init__(self) -> None:
        """Raises BadWeights for shapes that no decoder can have."""
        counts = ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size")
        for name in (*counts, "vocab_size", "max_positions"):
            _check_count(name, getattr(self, name))
        tokens = self.eos_tokens if self.bos_token is None else (*self.eos_tokens, self.bos_token)
        checks = (
            (self.num_heads % self.num_kv_heads == 0, f"{self.num_heads} heads share {self.num_kv_heads} KV heads"),
            (self.head_dim % 2 == 0, f"its head size {self.head_dim} is odd"),
            (0 < self.rope_theta < math.inf, f"its RoPE base is {self.rope_theta}"),
            (0 < self.rms_norm_eps < math.inf, f"its RMS norm epsilon is {self.rms_norm_eps}"),
            (all(isinstance(token, int) for token in tokens), f"its first or last tokens are {tokens}"),
        )
        for holds, message in checks:
            if not holds:
                raise BadWeights(f"this model cannot be computed: {message}")

    @property
    def even_context(self) -> float:
        """The context length at which attention takes as many operations a token as the weights, the head aside, do."""
        num_mixtures = len(self.experts.layers) if self.experts else 0  # layers with experts
        width = (self.num_layers - num_mixtures) * self.intermediate_size
        if self.experts:
            width += num_mixtures * self.experts.num_active * self.experts.intermediate_size
        heads = self.num_layers * (2 * self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        attention = 2 * self.num_layers * self.num_heads * self.head_dim
        return self.hidden_size * (heads + 3 * width) / attention

    def shard(self, size: int) -> ModelConfig:
        """The config of one of `size` shards: its own heads and MLP rows. Raises ConfigError where they do not divide."""
        if size == 1:
            return self
        widths = {"heads": self.num_heads, "KV heads": self.num_kv_heads}
        if self.experts is not None:
            widths["rows of an expert"] = self.experts.intermediate_size
        if self.experts is None or len(self.experts.layers) < self.num_layers:
            widths["MLP rows"] = self.intermediate_size
        for name, count in widths.items():
            if count % size:
                raise ConfigError(f"{size} shards cannot split this model: it has {count} {name}")
        experts = self.experts
        if experts is not None:
            experts = replace(experts, intermediate_size=experts.intermediate_size // size)
        return replace(
            self,
            num_heads=self.num_heads // size,
            num_kv_heads=self.num_kv_heads // size,
            intermediate_size=self.intermediate_size // size,
            experts=experts,
        )


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise BadWeights(f"the model's {name} is {value!r}, not a count")


@dataclass(frozen=True)
class GGUFExtras:
    """The part of a config that a GGUF file has as tensors: an output matrix of its own, and the values of rope_freqs."""

    has_output: bool
    rope_divisors: tuple[float, ...] = ()


@dataclass(frozen=True)
class Family:
    """A row of `models.families`: what the file formats call a family, and how it is read and computed.

    read_hf, read_gguf  the readers of config.json and of GGUF metadata, see `models.read_config`
    names               the tensors by their role in a block: (Hugging Face, GGUF), with {expert} for an expert's number
    attention, mlp      kinds of block, keys of `models.layers.ATTENTION` and `MLP`; `mlp` is that of the layers with experts
                        where the config lists some, the others are dense
    permuted_gguf       GGUF stores the rows of q and k in another order
    """

    name: str
    architecture: str
    gguf: str
    names: Mapping[str, tuple[str, str]]
    read_hf: Callable[[Mapping[str, Any], Family], ModelConfig]
    read_gguf: Callable[[Mapping[str, Any], Family, GGUFExtras], ModelConfig]
    attention: str = "grouped_query"
    mlp: str = "dense"
    attention_bias: bool = False
    qk_norm: bool = False
    permuted_gguf: bool = False
