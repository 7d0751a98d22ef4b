"""Readers of config.json and of GGUF metadata: each gives a ModelConfig, or says why the model cannot be computed.

A reader may raise KeyError, TypeError, ValueError and ZeroDivisionError for values that are missing or of the wrong kind;
`models.families` turns them into BadWeights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from paceline.errors import BadWeights, UnknownArchitecture
from paceline.models.config import Experts, Family, GGUFExtras, ModelConfig, RopeScaling


def dense_hf(values: Mapping[str, Any], family: Family) -> ModelConfig:
    """From the content of a config.json (either form of transformers 4 and 5)."""
    _refuse_unsupported(values, family)
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


def experts_hf(values: Mapping[str, Any], family: Family) -> ModelConfig:
    """`dense_hf` with a mixture of experts as Qwen3-MoE declares it."""
    config = dense_hf(values, family)
    count = values["num_experts"] if "num_experts" in values else values["num_local_experts"]
    step, dense = values.get("decoder_sparse_step", 1), values.get("mlp_only_layers") or []
    layers = frozenset(
        index for index in range(config.num_layers) if count and index not in dense and (index + 1) % step == 0
    )
    if not layers:
        return config
    experts = Experts(
        num_experts=count,
        num_active=values["num_experts_per_tok"],
        intermediate_size=values["moe_intermediate_size"],
        renormalise=bool(values.get("norm_topk_prob", False)),
        layers=layers,
    )
    return replace(config, experts=experts)


def dense_gguf(metadata: Mapping[str, Any], family: Family, extras: GGUFExtras) -> ModelConfig:
    """From a GGUF file's metadata."""

    def value(name: str, default: Any = None) -> Any:
        return _value(metadata, family, name, default)

    heads, hidden, context = (value(name) for name in ("attention.head_count", "embedding_length", "context_length"))
    if not all(isinstance(each, int) and each > 0 for each in (heads, hidden, context)):
        raise BadWeights(f"the GGUF file's heads, width and context are {heads!r}, {hidden!r}, {context!r}, not counts")
    head_dim = value("attention.key_length", hidden // heads)
    divisors = extras.rope_divisors
    if divisors and (2 * len(divisors) != head_dim or not all(0 < each < math.inf for each in divisors)):
        raise BadWeights(f"rope_freqs.weight does not hold a positive number for each of a head's {head_dim} / 2 pairs")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        raise BadWeights("the GGUF file lacks tokenizer.ggml.tokens")
    if value("rope.dimension_count", head_dim) != head_dim:
        raise UnknownArchitecture("this GGUF model rotates only a part of each head, which is not supported")
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
        rope_scaling=_gguf_scaling(metadata, family.gguf, context, divisors),
        max_positions=context,
        tie_embeddings=not extras.has_output,
        attention_bias=family.attention_bias,
        qk_norm=family.qk_norm,
        eos_tokens=tuple(dict.fromkeys(token for token in eos if token is not None)),
        bos_token=metadata.get("tokenizer.ggml.bos_token_id"),
    )


def experts_gguf(metadata: Mapping[str, Any], family: Family, extras: GGUFExtras) -> ModelConfig:
    """`dense_gguf` with experts in every layer, their shares renormalised, as llama.cpp computes Qwen3-MoE."""
    config = dense_gguf(metadata, family, extras)
    experts = Experts(
        num_experts=_value(metadata, family, "expert_count"),
        num_active=_value(metadata, family, "expert_used_count"),
        intermediate_size=_value(metadata, family, "expert_feed_forward_length"),
        renormalise=True,
        layers=frozenset(range(config.num_layers)),
    )
    return replace(config, experts=experts)


def _value(metadata: Mapping[str, Any], family: Family, name: str, default: Any = None) -> Any:
    found = metadata.get(f"{family.gguf}.{name}", default)
    if found is None:
        raise BadWeights(f"the GGUF file lacks {family.gguf}.{name}")
    return found


def _refuse_unsupported(values: Mapping[str, Any], family: Family) -> None:
    architecture = values["architectures"][0]
    layers = values.get("layer_types") or []
    window = values.get("use_sliding_window", False) or any(each != "full_attention" for each in layers)
    if architecture == "MistralForCausalLM":
        window = values.get("sliding_window", 4096) is not None  # transformers' default where the key is left out
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    rotated = rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0))
    reasons = {
        "sliding-window attention": window,
        "quantised weights": values.get("quantization_config") is not None,
        "an MLP bias": values.get("mlp_bias", False),
        "an attention bias": values.get("attention_bias", False) and not family.attention_bias,
        "a RoPE over a part of each head": rotated not in (None, 1.0),
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
