"""Random drafters for the tiny targets of tests/tiny.py, written as checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paceline.drafters.checkpoint import tensor_shapes, write_checkpoint
from paceline.drafters.config import DraftConfig
from paceline.engine.engine import Engine
from paceline.models.config import ModelConfig
from tests.tiny import tiny_config, tiny_engine


def eagle3_config(target: ModelConfig, **changes: Any) -> DraftConfig:
    """An EAGLE-3 drafter for `target`, which drafts every second token of its vocabulary."""
    layer = replace(target, family="llama", num_layers=1, tie_embeddings=False, attention_bias=False, qk_norm=False)
    values: dict[str, Any] = {
        "kind": "eagle3",
        "layer": layer,
        "features": (0, 1, target.num_layers),
        "target_hidden_size": target.hidden_size,
        "draft_vocab_size": target.vocab_size // 2,
    }
    return DraftConfig(**{**values, **changes})


def random_eagle3(config: DraftConfig, seed: int = 0) -> dict[str, Tensor]:
    """Its tensors but for the head, which is the target's."""
    draw = torch.Generator().manual_seed(seed)
    layer, hidden = config.layer, config.layer.hidden_size
    heads, kv_heads = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
    shapes = {
        "fc": (hidden, len(config.features) * config.target_hidden_size),
        "layers.0.self_attn.q_proj": (heads, 2 * hidden),
        "layers.0.self_attn.k_proj": (kv_heads, 2 * hidden),
        "layers.0.self_attn.v_proj": (kv_heads, 2 * hidden),
        "layers.0.self_attn.o_proj": (hidden, heads),
        "layers.0.mlp.gate_proj": (layer.intermediate_size, hidden),
        "layers.0.mlp.up_proj": (layer.intermediate_size, hidden),
        "layers.0.mlp.down_proj": (hidden, layer.intermediate_size),
    }
    tensors = {f"{name}.weight": torch.randn(shape, generator=draw) / shape[1] ** 0.5 for name, shape in shapes.items()}
    for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm"):
        tensors[f"layers.0.{name}.weight"] = torch.ones(hidden)
    tensors["norm.weight"] = torch.ones(hidden)
    if layer.qk_norm:
        for part in "qk":
            tensors[f"layers.0.self_attn.{part}_norm.weight"] = 1 + 0.2 * torch.randn(layer.head_dim, generator=draw)
    if config.norm_before_fc:
        tensors["input_norm.weight"] = torch.ones(shapes["fc"][1])
    if config.fc_norm:
        for index in range(len(config.features)):
            tensors[f"fc_norm.{index}.weight"] = torch.ones(config.target_hidden_size)
    return tensors


def tiny_eagle3(path: Path, target: ModelConfig, **changes: Any) -> None:
    """Writes a random EAGLE-3 drafter for `target` to `path`."""
    config = eagle3_config(target, **changes)
    draft_tokens = torch.arange(config.draft_vocab_size) * target.vocab_size // config.draft_vocab_size
    write_checkpoint(path, config, random_eagle3(config), draft_tokens, style="paceline")


def dflash_config(target: ModelConfig, **changes: Any) -> DraftConfig:
    """A block drafter of two layers for `target`, with both heads, which drafts every second token of its vocabulary."""
    layer = replace(target, family="qwen3", num_layers=2, tie_embeddings=False, attention_bias=False, qk_norm=True)
    values: dict[str, Any] = {
        "kind": "dflash",
        "layer": layer,
        "features": (1, target.num_layers),
        "target_hidden_size": target.hidden_size,
        "draft_vocab_size": target.vocab_size // 2,
        "block_size": 6,
        "mask_token": target.vocab_size - 2,
        "sample_from_anchor": True,
        "markov_rank": 8,
        "confidence_head": True,
    }
    return DraftConfig(**{**values, **changes})


def random_dflash(config: DraftConfig, seed: int = 0) -> dict[str, Tensor]:
    """Its tensors but for the head, which is the target's. Norms are not all ones, so that each counts."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in tensor_shapes(config)[0].items():
        values = torch.randn(shape, generator=draw)
        tensors[name] = values / shape[1] ** 0.5 if len(shape) == 2 else 1 + 0.2 * values
    return tensors


def tiny_dflash(path: Path, target: ModelConfig, **changes: Any) -> None:
    """Writes a random block drafter for `target` to `path`."""
    config = dflash_config(target, **changes)
    draft_tokens = torch.arange(config.draft_vocab_size) * target.vocab_size // config.draft_vocab_size
    write_checkpoint(path, config, random_dflash(config), draft_tokens, style="paceline")


WRITERS: dict[str, Callable[..., None]] = {"eagle3": tiny_eagle3, "joint": tiny_eagle3, "dflash": tiny_dflash}


def settings_for(drafter: str, folder: Path, target: ModelConfig) -> dict[str, str]:
    """The settings of a drafter of `config.DRAFTERS`; a trained one gets a random checkpoint in `folder`."""
    writer = WRITERS.get(drafter)
    if writer is None:
        return {"drafter": drafter}
    path = folder / f"{drafter}-{target.hidden_size}-{target.vocab_size}.safetensors"
    if not path.exists():
        writer(path, target)
    return {"drafter": drafter, "draft_model": str(path)}


def engine_with(drafter: str, folder: Path, **settings: Any) -> Engine:
    """A tiny engine with a drafter of `config.DRAFTERS`."""
    target = tiny_config(**settings.get("shape", {}))
    return tiny_engine(**settings_for(drafter, folder, target), **settings)
