"""The dense decoder that Llama, Qwen2 and Qwen3 share: five fused operations a layer, differences as data."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from paceline.errors import BadWeights
from paceline.kv.cache import KVCache
from paceline.models.config import ModelConfig
from paceline.models.rope import rope_table
from paceline.ops.attention import AttentionBatch, paged_attention
from paceline.ops.linear import Weight, linear_add, norm_gated, norm_linear
from paceline.ops.rope import rope_and_cache


@dataclass
class Layer:
    """The weights of one layer. `head_norms` (query, key, eps) where the family normalises heads (Qwen3)."""

    attention_norm: Tensor
    qkv: Weight
    head_norms: tuple[Tensor, Tensor, float] | None
    output: Weight
    mlp_norm: Tensor
    gate_up: Weight
    down: Weight


class Decoder:
    """`forward` is the whole model: tokens in, logits out, keys and values written to the cache on the way."""

    def __init__(self, config: ModelConfig, tensors: Iterable[tuple[str, Tensor]], device: torch.device) -> None:
        self.config = config
        self.device = device
        loader = _Loader(tensors, device, _expected(config))
        self.layers = [loader.layer(index, config) for index in range(config.num_layers)]
        self.embedding = loader.take("model.embed_tokens.weight")
        self.norm = loader.take("model.norm.weight")
        head = self.embedding if config.tie_embeddings else loader.take("lm_head.weight")
        self.head = Weight(head)
        self.dtype = self.embedding.dtype
        loader.expect_empty()
        self._tables: list[Tensor] = []
        self.rope = torch.empty(0)

    def prepare(self, num_positions: int) -> None:
        """Makes the RoPE table reach positions below `num_positions`; to be called before `forward`.

        A table made before stays alive: captured graphs read it where it is.
        """
        if num_positions > len(self.rope):
            self._tables.append(rope_table(self.config, num_positions).to(self.device))
            self.rope = self._tables[-1]

    def forward(self, tokens: Tensor, cache: KVCache, batch: AttentionBatch, rows: Tensor | None = None) -> Tensor:
        """tokens [T] -> logits [T, V], or [N, V] of the N token rows in `rows`. K and V of all T are in the cache."""
        config, eps = self.config, self.config.rms_norm_eps
        scale = 1.0 / math.sqrt(config.head_dim)
        hidden = torch.nn.functional.embedding(tokens, self.embedding)
        normed = None
        norms = [layer.attention_norm for layer in self.layers[1:]] + [self.norm]
        for index, (layer, next_norm) in enumerate(zip(self.layers, norms, strict=True)):
            keys, values = cache.layer(index)
            qkv = norm_linear(hidden, layer.attention_norm, eps, layer.qkv, normed)
            query = rope_and_cache(
                qkv, self.rope, batch.positions, batch.slots, keys, values, config.num_heads, layer.head_norms
            )
            if rows is not None and next_norm is self.norm:
                if len(rows) == 0:
                    return hidden.new_empty(0, config.vocab_size)
                query, hidden, batch = query[rows], hidden[rows], batch.only(rows)
            attended = paged_attention(query, keys, values, batch, cache.page_size, scale).flatten(1)
            hidden, normed = linear_add(attended, layer.output, hidden, layer.mlp_norm, eps)
            gated = norm_gated(hidden, layer.mlp_norm, eps, layer.gate_up, normed)
            hidden, normed = linear_add(gated, layer.down, hidden, next_norm, eps)
        return norm_linear(hidden, self.norm, eps, self.head, normed)


_MOST_NAMED = 20


def _expected(config: ModelConfig) -> list[str]:
    """The names of all tensors of a model, in the order in which they are taken."""
    parts = ["input_layernorm.weight"]
    for part in "qkv":
        parts += [f"self_attn.{part}_proj.{kind}" for kind in ("weight", *(["bias"] if config.attention_bias else []))]
    if config.qk_norm:
        parts += ["self_attn.q_norm.weight", "self_attn.k_norm.weight"]
    parts += ["self_attn.o_proj.weight", "post_attention_layernorm.weight"]
    parts += [f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
    names = [f"model.layers.{index}.{part}" for index in range(config.num_layers) for part in parts]
    return [
        *names,
        "model.embed_tokens.weight",
        "model.norm.weight",
        *([] if config.tie_embeddings else ["lm_head.weight"]),
    ]


class _Loader:
    """Collects a checkpoint's tensors by name and joins those that one operation uses."""

    def __init__(self, tensors: Iterable[tuple[str, Tensor]], device: torch.device, expected: list[str]) -> None:
        self.device = device
        self.waiting: dict[str, Tensor] = {}
        self.stream = iter(tensors)
        self._missing = dict.fromkeys(expected)

    def take(self, name: str) -> Tensor:
        while name not in self.waiting:
            found = next(self.stream, None)
            if found is None:
                missing = list(self._missing)
                more = f" and {len(missing) - _MOST_NAMED} more" if len(missing) > _MOST_NAMED else ""
                raise BadWeights(f"the checkpoint lacks the tensors {', '.join(missing[:_MOST_NAMED])}{more}")
            self.waiting[found[0]] = found[1].to(self.device)
            self._missing.pop(found[0], None)
        return self.waiting.pop(name)

    def joined(self, names: list[str], bias: bool = False, gated: bool = False) -> Weight:
        matrix = torch.cat([self.take(f"{name}.weight") for name in names])
        biases = torch.cat([self.take(f"{name}.bias") for name in names]) if bias else None
        return Weight(matrix, biases, gated=gated)

    def layer(self, index: int, config: ModelConfig) -> Layer:
        base = f"model.layers.{index}."
        attention, mlp = base + "self_attn.", base + "mlp."
        head_norms = None
        if config.qk_norm:
            norms = self.take(attention + "q_norm.weight"), self.take(attention + "k_norm.weight")
            head_norms = (*norms, config.rms_norm_eps)
        return Layer(
            attention_norm=self.take(base + "input_layernorm.weight"),
            qkv=self.joined([attention + f"{part}_proj" for part in "qkv"], config.attention_bias),
            head_norms=head_norms,
            output=self.joined([attention + "o_proj"]),
            mlp_norm=self.take(base + "post_attention_layernorm.weight"),
            gate_up=self.joined([mlp + "gate_proj", mlp + "up_proj"], gated=True),
            down=self.joined([mlp + "down_proj"]),
        )

    def expect_empty(self) -> None:
        """A checkpoint with tensors the model has no place for is another model: say so rather than drop them."""
        for name, tensor in self.stream:
            self.waiting[name] = tensor
        left = [name for name in self.waiting if not name.endswith("rotary_emb.inv_freq") and name != "lm_head.weight"]
        if left:
            raise BadWeights(f"the checkpoint has {len(left)} tensors this model has no place for, first {left[0]!r}")
