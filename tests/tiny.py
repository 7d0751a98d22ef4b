"""Tiny random models and a byte tokenizer, for tests that need an engine but no trained weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from paceline.config import EngineConfig, Hardware, resolve
from paceline.engine.engine import Engine
from paceline.models.config import Experts, ModelConfig
from paceline.models.decoder import Decoder

VOCABULARY = 258
EOS = 257


class ByteTokenizer:
    """Token i is byte i; 256 is unused, 257 ends the output. A replacement for Tokenizer, whose own tests use real ones."""

    eos_tokens = (EOS,)
    vocab_size = VOCABULARY

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        return list(text.encode())

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b""

    text_bytes = token_bytes


def tiny_config(family: str = "qwen2", **changes: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "family": family,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "intermediate_size": 64,
        "vocab_size": VOCABULARY,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "max_positions": 4096,
        "tie_embeddings": True,
        "attention_bias": family == "qwen2",
        "qk_norm": family in ("qwen3", "qwen3_moe"),
        "eos_tokens": (EOS,),
        "bos_token": None,
        "experts": Experts(6, 2, 24, True, frozenset([1])) if family == "qwen3_moe" else None,
    }
    return ModelConfig(**{**values, **changes})


def random_tensors(
    config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights under the Hugging Face names, large enough in scale that greedy choices are far apart."""
    draw = torch.Generator().manual_seed(seed)

    def tensor(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=draw) * (2.0 / shape[-1] ** 0.5)).to(dtype)

    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    yield "model.embed_tokens.weight", tensor(config.vocab_size, config.hidden_size)
    for index in range(config.num_layers):
        base = f"model.layers.{index}."
        yield base + "input_layernorm.weight", torch.ones(config.hidden_size, dtype=dtype)
        yield base + "post_attention_layernorm.weight", torch.ones(config.hidden_size, dtype=dtype)
        for part, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            yield base + f"self_attn.{part}_proj.weight", tensor(count * dim, config.hidden_size)
            if config.attention_bias:
                yield base + f"self_attn.{part}_proj.bias", tensor(count * dim)
        if config.qk_norm:
            yield base + "self_attn.q_norm.weight", torch.ones(dim, dtype=dtype)
            yield base + "self_attn.k_norm.weight", torch.ones(dim, dtype=dtype)
        yield base + "self_attn.o_proj.weight", tensor(config.hidden_size, heads * dim)
        width, mlps = config.intermediate_size, ["mlp."]
        if config.experts is not None and index in config.experts.layers:
            width, mlps = (
                config.experts.intermediate_size,
                [f"mlp.experts.{e}." for e in range(config.experts.num_experts)],
            )
            yield base + "mlp.gate.weight", tensor(config.experts.num_experts, config.hidden_size)
        for mlp in mlps:
            for part in ("gate", "up"):
                yield base + mlp + f"{part}_proj.weight", tensor(width, config.hidden_size)
            yield base + mlp + "down_proj.weight", tensor(config.hidden_size, width)
    yield "model.norm.weight", torch.ones(config.hidden_size, dtype=dtype)
    if not config.tie_embeddings:
        yield "lm_head.weight", tensor(config.vocab_size, config.hidden_size)


def tiny_engine(family: str = "qwen2", seed: int = 0, shape: dict[str, Any] | None = None, **settings: Any) -> Engine:
    config = tiny_config(family, **(shape or {}))
    values = {"device": "cpu", "dtype": "float32", "max_context": 512, "cache_tokens": 4096, "threads": 1, **settings}
    on_gpu = values["device"] == "cuda"
    resolved = resolve(EngineConfig(**values), Hardware(on_gpu, 1, 1 << 30), config.max_positions)
    dtype = getattr(torch, resolved.dtype)
    model = Decoder(config, random_tensors(config, seed, dtype), torch.device(resolved.device))
    return Engine(model, ByteTokenizer(), resolved)  # type: ignore[arg-type]
