"""What a decoder model looks like, read from config.json or from GGUF metadata. One table row names a family."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paceline.errors import BadWeights, UnknownArchitecture


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
class ModelConfig:
    """Shapes and constants of one dense decoder. Families differ in `attention_bias` and `qk_norm` alone."""

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

    def __post_init__(self) -> None:
        """Raises BadWeights for shapes that no decoder can have."""
        counts = ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size")
        for name in (*counts, "vocab_size", "max_positions"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise BadWeights(f"the model's {name} is {value!r}, not a count")
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


@dataclass(frozen=True)
class Family:
    """A row of the table: what the two file formats call it, and what really differs."""

    name: str
    architecture: str
    gguf: str
    attention_bias: bool
    qk_norm: bool
    permuted_gguf: bool  # GGUF stores the rows of q and k in another order for this family


FAMILIES = (
    Family("llama", "LlamaForCausalLM", "llama", attention_bias=False, qk_norm=False, permuted_gguf=True),
    Family("qwen2", "Qwen2ForCausalLM", "qwen2", attention_bias=True, qk_norm=False, permuted_gguf=False),
    Family("qwen3", "Qwen3ForCausalLM", "qwen3", attention_bias=False, qk_norm=True, permuted_gguf=False),
)


# Architectures that compute what a row's does. Mistral is one where no sliding window is in use.
_SAME_AS = {"MistralForCausalLM": "LlamaForCausalLM"}


def family_by(attribute: str, value: str) -> Family:
    """The row whose `attribute` is `value`; UnknownArchitecture names the nearest otherwise."""
    known = {getattr(family, attribute): family for family in FAMILIES}
    if value in known:
        return known[value]
    near = difflib.get_close_matches(value, known, n=1, cutoff=0.0)
    raise UnknownArchitecture(f"architecture {value!r} is not known; the nearest that is: {near[0]!r}")


def from_hf(values: Mapping[str, Any]) -> ModelConfig:
    """From the content of a config.json (either form of transformers 4 and 5)."""
    architectures = values.get("architectures") or ["(none)"]
    architecture = str(architectures[0])
    family = family_by("architecture", _SAME_AS.get(architecture, architecture))
    _refuse_unsupported(values, family, architecture)
    try:
        heads = values["num_attention_heads"]
        eos = values.get("eos_token_id")
        rope = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
        theta = rope.get("rope_theta", values.get("rope_theta", 10000.0))
        return ModelConfig(
            family=family.name,
            hidden_size=values["hidden_size"],
            num_layers=values["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=values.get("num_key_value_heads") or heads,
            head_dim=values.get("head_dim") or values["hidden_size"] // heads,
            intermediate_size=values["intermediate_size"],
            vocab_size=values["vocab_size"],
            rms_norm_eps=values.get("rms_norm_eps", 1e-6),
            rope_theta=float(theta),
            rope_scaling=_scaling(rope, values.get("max_position_embeddings", 2048)),
            max_positions=values.get("max_position_embeddings", 2048),
            tie_embeddings=bool(values.get("tie_word_embeddings", False)),
            attention_bias=family.attention_bias,
            qk_norm=family.qk_norm,
            eos_tokens=tuple(dict.fromkeys(eos)) if isinstance(eos, list) else () if eos is None else (eos,),
            bos_token=values.get("bos_token_id"),
        )
    except KeyError as error:
        raise BadWeights(f"config.json lacks {error.args[0]!r}") from error
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise BadWeights(f"config.json holds a value that is none: {error}") from error


def from_gguf(metadata: Mapping[str, Any], has_output: bool, rope_divisors: Sequence[float] = ()) -> ModelConfig:
    """From a GGUF file's metadata.

    `has_output` says whether it carries its own output matrix; `rope_divisors` is its rope_freqs.weight, if any.
    """
    family = family_by("gguf", str(metadata.get("general.architecture")))

    def value(name: str, default: Any = None) -> Any:
        found = metadata.get(f"{family.gguf}.{name}", default)
        if found is None:
            raise BadWeights(f"the GGUF file lacks {family.gguf}.{name}")
        return found

    heads, hidden, context = (value(name) for name in ("attention.head_count", "embedding_length", "context_length"))
    if not all(isinstance(each, int) and each > 0 for each in (heads, hidden, context)):
        raise BadWeights(f"the GGUF file's heads, width and context are {heads!r}, {hidden!r}, {context!r}, not counts")
    head_dim = value("attention.key_length", hidden // heads)
    if rope_divisors and (2 * len(rope_divisors) != head_dim or not all(0 < each < math.inf for each in rope_divisors)):
        raise BadWeights(f"rope_freqs.weight does not hold a positive number for each of a head's {head_dim} / 2 pairs")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        raise BadWeights("the GGUF file lacks tokenizer.ggml.tokens")
    if value("rope.dimension_count", head_dim) != head_dim:
        raise UnknownArchitecture("this GGUF model turns a part of each head only, which is not supported")
    if value("attention.sliding_window", context) not in (0, context):
        raise UnknownArchitecture("this GGUF model uses sliding-window attention, which is not supported")
    eos = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return ModelConfig(
        family=family.name,
        hidden_size=hidden,
        num_layers=value("block_count"),
        num_heads=heads,
        num_kv_heads=value("attention.head_count_kv", heads),
        head_dim=head_dim,
        intermediate_size=value("feed_forward_length"),
        vocab_size=len(tokens),
        rms_norm_eps=_number(value("attention.layer_norm_rms_epsilon")),
        rope_theta=_number(value("rope.freq_base", 10000.0)),
        rope_scaling=_gguf_scaling(metadata, family.gguf, context, tuple(rope_divisors)),
        max_positions=context,
        tie_embeddings=not has_output,
        attention_bias=family.attention_bias,
        qk_norm=family.qk_norm,
        eos_tokens=tuple(dict.fromkeys(token for token in eos if token is not None)),
        bos_token=metadata.get("tokenizer.ggml.bos_token_id"),
    )


def _refuse_unsupported(values: Mapping[str, Any], family: Family, architecture: str) -> None:
    layers = values.get("layer_types") or []
    window = values.get("use_sliding_window", False) or any(each != "full_attention" for each in layers)
    if architecture == "MistralForCausalLM":
        window = values.get("sliding_window", 4096) is not None  # transformers' default where the key is left out
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    turned = rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0))
    reasons = {
        "sliding-window attention": window,
        "quantised weights": values.get("quantization_config") is not None,
        "an MLP bias": values.get("mlp_bias", False),
        "an attention bias": values.get("attention_bias", False) and not family.attention_bias,
        "a RoPE over a part of each head": turned not in (None, 1.0),
        f"activation {values.get('hidden_act')!r}": values.get("hidden_act", "silu") != "silu",
    }
    for reason, applies in reasons.items():
        if applies:
            raise UnknownArchitecture(f"this {architecture} uses {reason}, which is not supported")


def _scaling(rope: Mapping[str, Any], max_positions: int) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind not in ("linear", "llama3", "yarn"):
        raise UnknownArchitecture(f"RoPE scaling {kind!r} is not known; known: linear, llama3, yarn")
    original = int(rope.get("original_max_position_embeddings") or max_positions)
    factor = rope["factor"]
    if factor is None and kind == "yarn":
        factor = max_positions / original
    return RopeScaling(
        kind=kind,
        factor=float(factor),
        original_max_positions=original,
        low_freq_factor=float(rope.get("low_freq_factor", 1.0)),
        high_freq_factor=float(rope.get("high_freq_factor", 4.0)),
        beta_fast=float(rope.get("beta_fast") or 32.0),
        beta_slow=float(rope.get("beta_slow") or 1.0),
        attention_factor=_attention_factor(rope, float(factor)),
        truncate=bool(rope.get("truncate", True)),
    )


def _attention_factor(rope: Mapping[str, Any], factor: float) -> float | None:
    """The factor on YaRN's cosines and sines where the config declares one, by itself or as DeepSeek's two scales."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    above, below = rope.get("mscale"), rope.get("mscale_all_dim")
    if not above or not below or factor <= 1:
        return None
    growth = 0.1 * math.log(factor)
    return float((above * growth + 1.0) / (below * growth + 1.0))


def _gguf_scaling(
    metadata: Mapping[str, Any], prefix: str, context: int, divisors: tuple[float, ...]
) -> RopeScaling | None:
    kind = metadata.get(f"{prefix}.rope.scaling.type", "none")
    if kind == "none":
        return RopeScaling("divided", divisors=divisors) if divisors else None
    if divisors:
        raise UnknownArchitecture(f"RoPE scaling {kind!r} together with rope_freqs.weight is not supported")
    if kind not in ("linear", "yarn"):
        raise UnknownArchitecture(f"RoPE scaling {kind!r} is not known; known in GGUF: linear, yarn")
    factor = _number(metadata.get(f"{prefix}.rope.scaling.factor"))
    return RopeScaling(kind, factor, int(metadata.get(f"{prefix}.rope.scaling.original_context_length") or context))


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadWeights(f"the GGUF file holds {value!r} where a number belongs")
    return float(value)
