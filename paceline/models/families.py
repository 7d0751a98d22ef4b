"""The table of model families: a row says what the file formats call a family, how it is read, and what it consists of."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from paceline.errors import BadWeights, UnknownArchitecture
from paceline.models.config import Family, GGUFExtras, ModelConfig
from paceline.models.read_config import dense_gguf, dense_hf, experts_gguf, experts_hf

# Tensors by role: the name in Hugging Face form and in GGUF form, without the ending (.weight, .bias). Those of a layer
# come after "model.layers.N." and "blk.N.".
WHOLE = {
    "embedding": ("model.embed_tokens", "token_embd"),
    "final_norm": ("model.norm", "output_norm"),
    "head": ("lm_head", "output"),
}
_ATTENTION = {
    "attention_norm": ("input_layernorm", "attn_norm"),
    "query": ("self_attn.q_proj", "attn_q"),
    "key": ("self_attn.k_proj", "attn_k"),
    "value": ("self_attn.v_proj", "attn_v"),
    "query_norm": ("self_attn.q_norm", "attn_q_norm"),
    "key_norm": ("self_attn.k_norm", "attn_k_norm"),
    "output": ("self_attn.o_proj", "attn_output"),
}
_DENSE = {
    "mlp_norm": ("post_attention_layernorm", "ffn_norm"),
    "gate": ("mlp.gate_proj", "ffn_gate"),
    "up": ("mlp.up_proj", "ffn_up"),
    "down": ("mlp.down_proj", "ffn_down"),
}
_EXPERTS = {
    "router": ("mlp.gate", "ffn_gate_inp"),
    "expert_gate": ("mlp.experts.{expert}.gate_proj", "ffn_gate_exps"),
    "expert_up": ("mlp.experts.{expert}.up_proj", "ffn_up_exps"),
    "expert_down": ("mlp.experts.{expert}.down_proj", "ffn_down_exps"),
}
_USUAL = {**_ATTENTION, **_DENSE}

FAMILIES = (
    Family("llama", "LlamaForCausalLM", "llama", _USUAL, dense_hf, dense_gguf, permuted_gguf=True),
    Family("qwen2", "Qwen2ForCausalLM", "qwen2", _USUAL, dense_hf, dense_gguf, attention_bias=True),
    Family("qwen3", "Qwen3ForCausalLM", "qwen3", _USUAL, dense_hf, dense_gguf, qk_norm=True),
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        "qwen3moe",
        {**_USUAL, **_EXPERTS},
        experts_hf,
        experts_gguf,
        mlp="experts",
        qk_norm=True,
    ),
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
    """From the content of a config.json. Raises UnknownArchitecture, or BadWeights for values that no model can have."""
    architectures = values.get("architectures") or ["(none)"]
    architecture = str(architectures[0])
    family = family_by("architecture", _SAME_AS.get(architecture, architecture))
    try:
        return family.read_hf(values, family)
    except KeyError as error:
        raise BadWeights(f"config.json lacks {error.args[0]!r}") from error
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise BadWeights(f"config.json holds a value that cannot be used: {error}") from error


def from_gguf(metadata: Mapping[str, Any], has_output: bool, rope_divisors: Sequence[float] = ()) -> ModelConfig:
    """From a GGUF file's metadata. Raises UnknownArchitecture, or BadWeights for values that no model can have.

    `has_output` says whether it has an output matrix of its own; `rope_divisors` is its rope_freqs.weight, if any.
    """
    family = family_by("gguf", str(metadata.get("general.architecture")))
    return family.read_gguf(metadata, family, GGUFExtras(has_output, tuple(rope_divisors)))
