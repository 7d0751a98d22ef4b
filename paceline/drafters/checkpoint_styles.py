"""The config of a drafter in three forms: Paceline's own, SGLang's (as SpecForge writes it) and vLLM's (as speculators does).

They count the target's layers differently. DraftConfig.features and speculators name the hidden state after k layers (0: the
embeddings); SpecForge names the layer whose output it is, so k - 1. For 36 layers [2, 18, 33] here is [1, 17, 32] there.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from paceline.drafters.config import DraftConfig
from paceline.errors import BadDrafter, ModelError
from paceline.models.config import ModelConfig, RopeScaling
from paceline.models.families import family_by, from_hf

_log = logging.getLogger(__name__)

Values = Mapping[str, Any]
# Architectures of flat configs (SpecForge, SGLang, vLLM).
_ARCHITECTURES = {
    "LlamaForCausalLMEagle3": "eagle3",
    "Eagle3LlamaForCausalLM": "eagle3",
    "Eagle3Qwen3ForCausalLM": "eagle3",
    "DFlashDraftModel": "dflash",
    "DSparkDraftModel": "dspark",
    "Qwen3DSparkModel": "dspark",
}
_SPECULATORS = ("eagle3", "dflash", "dspark")
_ARCHITECTURE_OF_STYLE = {
    "sglang": {"eagle3": "LlamaForCausalLMEagle3", "dflash": "DFlashDraftModel", "dspark": "DSparkDraftModel"},
    "vllm": {"eagle3": "Eagle3Speculator", "dflash": "DFlashSpeculator", "dspark": "DSparkSpeculator"},
}
_DIGESTS = ("target_digest", "vocabulary_digest")
_MARKOV_RANK = 256  # the rank where a DSpark config names none, in SpecForge as in speculators
_SPECULATIVE_TOKENS = 5  # what a server drafts with EAGLE-3 where the card does not say: speculators' default


def to_values(config: DraftConfig) -> dict[str, Any]:
    """The config as JSON values, for Paceline's own files."""
    return asdict(config)


def from_values(values: Values) -> DraftConfig:
    """What `to_values` gave. Raises BadDrafter for missing, unknown or impossible values."""
    try:
        layer = dict(values["layer"])
        if layer.get("rope_scaling"):
            scaling = layer["rope_scaling"]
            layer["rope_scaling"] = RopeScaling(**{**scaling, "divisors": tuple(scaling["divisors"])})
        model = ModelConfig(**{**layer, "eos_tokens": tuple(layer["eos_tokens"])})
        return DraftConfig(**{**values, "layer": model, "features": tuple(values["features"])})
    except KeyError as error:
        raise BadDrafter(f"the drafter's config lacks {error.args[0]!r}") from error
    except BadDrafter:
        raise
    except (TypeError, ValueError, ModelError) as error:
        raise BadDrafter(f"the drafter's config cannot be used: {error}") from error


def from_json(values: Values, num_target_layers: int | None = None) -> DraftConfig:
    """From a config.json in SGLang's or vLLM's style.

    `num_target_layers` serves where the config names no layers of the target: the servers' default depends on it.
    Raises BadDrafter for an unknown architecture and for values that are missing or cannot be used.
    """
    try:
        if "speculators_model_type" in values:
            return _from_speculators(values, num_target_layers)
        return _from_flat(values, num_target_layers)
    except KeyError as error:
        raise BadDrafter(f"the drafter's config.json lacks {error.args[0]!r}") from error
    except BadDrafter:
        raise
    except (TypeError, ValueError, AttributeError, ModelError) as error:
        raise BadDrafter(f"the drafter's config.json cannot be used: {error}") from error


def to_json(config: DraftConfig, style: str, card: Values, dtype: str) -> dict[str, Any]:
    """The config.json in the style "sglang" or "vllm".

    The card may name the target (`target`, for vLLM's verifier) and the tokens to draft (`speculative_tokens`).
    Raises BadDrafter for what the style cannot say.
    """
    kind = _kind(config)
    common = {
        "architectures": [_ARCHITECTURE_OF_STYLE[style][kind]],
        "torch_dtype": dtype,
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.target_hidden_size,
        "paceline": {name: getattr(config, name) for name in _DIGESTS},
    }
    if style == "sglang":
        return {**_layer_values(config.layer), **common, **_flat_values(config)}
    layer = {**_layer_values(config.layer), "num_aux_hidden_states": len(config.features)}
    return {**common, **_speculators_values(config, card), "transformer_layer_config": layer}


def _kind(config: DraftConfig) -> str:
    return "dspark" if config.markov_rank or config.confidence_head else config.kind


def _from_speculators(values: Values, num_target_layers: int | None) -> DraftConfig:
    kind = str(values["speculators_model_type"])
    if kind not in _SPECULATORS:
        raise BadDrafter(
            f"speculators_model_type {kind!r} is not known; the nearest that is: {_nearest(kind, _SPECULATORS)!r}"
        )
    inner = dict(values["transformer_layer_config"])
    layer = _layer(inner)
    common: dict[str, Any] = {
        "layer": layer,
        "target_hidden_size": values.get("target_hidden_size") or layer.hidden_size,
        "draft_vocab_size": values.get("draft_vocab_size") or layer.vocab_size,
        **_digests(values),
    }
    if kind == "eagle3":
        ids = values.get("eagle_aux_hidden_state_layer_ids")
        before = values.get("norm_before_residual")
        if before is None:
            _log.warning("this speculators config does not say norm_before_residual: taken as true, as vLLM does")
        common |= {name: bool(values.get(name)) for name in ("norm_before_fc", "fc_norm", "norm_output")}
        return DraftConfig(
            kind="eagle3",
            features=tuple(ids) if ids else _default_features(num_target_layers),
            norm_before_residual=True if before is None else bool(before),
            **common,
        )
    return DraftConfig(
        kind="dflash",
        features=tuple(values["aux_hidden_state_layer_ids"]),
        **_block(values, kind, values.get("block_size")),
        **common,
    )


def _from_flat(values: Values, num_target_layers: int | None) -> DraftConfig:
    architecture = str((values.get("architectures") or ["(none)"])[0])
    if architecture not in _ARCHITECTURES:
        near = _nearest(architecture, tuple(_ARCHITECTURES))
        raise BadDrafter(f"architecture {architecture!r} is not that of a known drafter; the nearest that is: {near!r}")
    kind = _ARCHITECTURES[architecture]
    layer = _layer(values)
    common: dict[str, Any] = {
        "layer": layer,
        "target_hidden_size": values.get("target_hidden_size") or layer.hidden_size,
        "draft_vocab_size": values.get("draft_vocab_size") or layer.vocab_size,
        **_digests(values),
    }
    if values.get("tie_word_embeddings") and common["draft_vocab_size"] != layer.vocab_size:
        raise BadDrafter(
            "tie_word_embeddings is true, but the head has "
            f"{common['draft_vocab_size']} rows and the embeddings have {layer.vocab_size}"
        )
    if kind == "eagle3":
        return _flat_eagle3(values, common, num_target_layers)
    inner = values.get("dflash_config") or {}
    keys = {**values, **inner}
    ids = keys.get("target_layer_ids")
    if not ids:
        raise BadDrafter("config.json names no target_layer_ids, the layers of the target that the drafter reads")
    return DraftConfig(
        kind="dflash",
        features=tuple(each + 1 for each in ids),
        **_block(keys, kind, values.get("block_size", keys.get("block_size"))),
        **common,
    )


def _flat_eagle3(values: Values, common: dict[str, Any], num_target_layers: int | None) -> DraftConfig:
    inner = values.get("eagle_config") or {}
    if not inner.get("use_aux_hidden_state", True):
        raise BadDrafter(
            "use_aux_hidden_state is false: a drafter that reads the last hidden state only is not supported"
        )
    ids = inner.get("eagle_aux_hidden_state_layer_ids")
    features = tuple(each + 1 for each in ids or ())
    features = features or tuple(values.get("eagle_aux_hidden_state_layer_ids") or ())  # vLLM's, in its own numbering
    features = features or _default_features(num_target_layers)
    return DraftConfig(
        kind="eagle3",
        features=features,
        norm_before_residual=bool(values.get("norm_before_residual", False)),
        norm_before_fc=bool(inner.get("norm_before_fc", values.get("norm_before_fc", False))),
        fc_norm=bool(values.get("fc_norm", False)),
        norm_output=bool(values.get("norm_output", False)),
        **common,
    )


def _default_features(num_layers: int | None) -> tuple[int, ...]:
    """What SGLang, vLLM, SpecForge and speculators all take where the config names no layers."""
    if num_layers is None:
        raise BadDrafter(
            "config.json names no eagle_aux_hidden_state_layer_ids, and the default depends on the target: name the target"
        )
    return (2, num_layers // 2, num_layers - 3)


def _block(keys: Values, kind: str, size: Any) -> dict[str, Any]:
    """The fields of a DFlash block and of DSpark's heads."""
    if not isinstance(size, int):
        raise BadDrafter(f"config.json has the block_size {size!r}, not a count")
    if not isinstance(keys.get("mask_token_id"), int):
        raise BadDrafter(f"config.json has the mask_token_id {keys.get('mask_token_id')!r}, not a token")
    rank, confidence = 0, False
    if kind == "dspark" or keys.get("projector_type") == "dspark":
        rank = int(keys.get("markov_rank", _MARKOV_RANK))
        confidence = bool(keys.get("enable_confidence_head", True))
    elif keys.get("projector_type"):
        raise BadDrafter(f"projector_type {keys['projector_type']!r} is not supported; known: dspark")
    if rank and keys.get("markov_head_type", "vanilla") != "vanilla":
        raise BadDrafter(f"markov_head_type {keys['markov_head_type']!r} is not supported; known: vanilla")
    if confidence and rank and not keys.get("confidence_head_with_markov", True):
        raise BadDrafter("confidence_head_with_markov is false: such a confidence head is not supported")
    return {
        "block_size": size,
        "mask_token": keys["mask_token_id"],
        "sample_from_anchor": bool(keys.get("sample_from_anchor", False)),
        "markov_rank": rank,
        "confidence_head": confidence,
    }


def _layer(values: Values) -> ModelConfig:
    """The shapes of the drafter's layers. Its own embeddings are never tied to its head."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if values.get("rope_theta") is None and rope.get("rope_theta") is None:
        raise BadDrafter(
            "config.json has no rope_theta (neither by itself nor in rope_parameters): it was dropped when this drafter was "
            "converted; add the one that it was trained with"
        )
    family = family_by("name", str(values.get("model_type", "llama")))
    if family.name not in ("llama", "qwen3"):
        raise BadDrafter(f"a drafter with layers of {family.name!r} is not supported; the nearest that is: 'qwen3'")
    return replace(from_hf({**values, "architectures": [family.architecture]}), tie_embeddings=False)


def _layer_values(layer: ModelConfig) -> dict[str, Any]:
    values: dict[str, Any] = {
        "model_type": layer.family,
        "hidden_act": "silu",
        "hidden_size": layer.hidden_size,
        "num_hidden_layers": layer.num_layers,
        "num_attention_heads": layer.num_heads,
        "num_key_value_heads": layer.num_kv_heads,
        "head_dim": layer.head_dim,
        "intermediate_size": layer.intermediate_size,
        "vocab_size": layer.vocab_size,
        "rms_norm_eps": layer.rms_norm_eps,
        "max_position_embeddings": layer.max_positions,
        "rope_theta": layer.rope_theta,
        "rope_scaling": _rope_values(layer.rope_scaling),
        "attention_bias": False,
        "tie_word_embeddings": False,
        "eos_token_id": list(layer.eos_tokens),
        "bos_token_id": layer.bos_token,
    }
    if layer.family == "qwen3":
        values["layer_types"] = ["full_attention"] * layer.num_layers
    return values


def _rope_values(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if scaling.kind == "divided":
        raise BadDrafter(
            "the RoPE divisors of a GGUF file cannot be said in config.json: export from the original model"
        )
    values: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        values["original_max_position_embeddings"] = scaling.original_max_positions
    if scaling.kind == "llama3":
        values |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "yarn":
        names = ("beta_fast", "beta_slow", "attention_factor", "truncate")
        values |= {name: getattr(scaling, name) for name in names}
    return values


def _flat_values(config: DraftConfig) -> dict[str, Any]:
    if 0 in config.features:
        raise BadDrafter("this drafter reads the embeddings (layer 0), which SGLang's numbering cannot name")
    ids = [each - 1 for each in config.features]
    if config.kind == "eagle3":
        if config.layer.family != "llama":
            raise BadDrafter(f"SGLang runs EAGLE-3 layers of Llama only, not of {config.layer.family}")
        if config.norm_before_residual:
            raise BadDrafter(
                "norm_before_residual is true, and SGLang adds the state itself to the residual, whatever it says"
            )
        return {
            "eagle_config": {
                "eagle_aux_hidden_state_layer_ids": ids,
                "use_aux_hidden_state": True,
                "norm_before_fc": config.norm_before_fc,
            },
            "num_aux_hidden_states": len(ids),
            "fc_norm": config.fc_norm,
            "norm_output": config.norm_output,
        }
    inner = {
        "mask_token_id": config.mask_token,
        "target_layer_ids": ids,
        "sample_from_anchor": config.sample_from_anchor,
    }
    if _kind(config) == "dspark":
        inner |= {"projector_type": "dspark", **_head_values(config)}
    return {"block_size": config.block_size, "dflash_config": inner}


def _speculators_values(config: DraftConfig, card: Values) -> dict[str, Any]:
    kind = _kind(config)
    drafted = (
        config.num_drafted if config.kind == "dflash" else int(card.get("speculative_tokens", _SPECULATIVE_TOKENS))
    )
    values: dict[str, Any] = {
        "speculators_model_type": kind,
        "speculators_config": {
            "algorithm": kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": drafted}],
            "verifier": {"name_or_path": str(card.get("target", "")), "architectures": []},
        },
    }
    ids = list(config.features)
    if config.kind == "eagle3":
        names = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
        return {
            **values,
            "eagle_aux_hidden_state_layer_ids": ids,
            "embed_requires_grad": False,
            **{name: getattr(config, name) for name in names},
        }
    if kind == "dflash" and config.sample_from_anchor:
        raise BadDrafter(
            "sample_from_anchor is true, which vLLM supports for drafters with a Markov or confidence head only"
        )
    return {
        **values,
        "aux_hidden_state_layer_ids": ids,
        "block_size": config.block_size,
        "mask_token_id": config.mask_token,
        "sample_from_anchor": config.sample_from_anchor,
        "sliding_window_non_causal": True,  # vLLM takes false for a causal block in every layer
        **(_head_values(config) if kind == "dspark" else {}),
    }


def _head_values(config: DraftConfig) -> dict[str, Any]:
    return {
        "markov_rank": config.markov_rank,
        "markov_head_type": "vanilla",
        "enable_confidence_head": config.confidence_head,
        "confidence_head_with_markov": config.confidence_head and config.markov_rank > 0,
    }


def _digests(values: Values) -> dict[str, str]:
    """What Paceline adds to a config.json that it writes."""
    ours = values.get("paceline") or {}
    return {name: str(ours.get(name, "")) for name in _DIGESTS}


def _nearest(name: str, known: tuple[str, ...]) -> str:
    return difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
