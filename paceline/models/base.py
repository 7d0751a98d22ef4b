"""What the engine needs of a model: its cache layout, and one forward pass over a batch of tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from paceline.kv.cache import KVCache
from paceline.kv.layout import CacheLayout
from paceline.models.config import ModelConfig
from paceline.ops.attention import AttentionBatch


@dataclass(slots=True)
class Output:
    """The result of a forward pass.

    logits    [T, V], or [N, V] of the N token rows that were asked for
    features  [T, len(want) * H]: the hidden states that were asked for, side by side in the order of `want`; of all T
              tokens also where logits are of some rows only; None where `want` is empty
    """

    logits: Tensor
    features: Tensor | None = None


class Model(ABC):
    """A language model on one device. Subclasses set the attributes.

    `dtype` is that of hidden states and cache; `embedding` [V, H] the rows that tokens become. `identity` is that of the
    checkpoint (`Checkpoint.identity`) and `vocabulary` a digest of its tokens, "" where they are not known.
    """

    config: ModelConfig
    dtype: torch.dtype
    device: torch.device
    embedding: Tensor
    identity: str = ""
    vocabulary: str = ""

    @abstractmethod
    def head_rows(self, tokens: Tensor | None) -> Tensor:
        """The rows of the head that give the logits of `tokens` [N] int64, of all where None: [N, H]."""

    @abstractmethod
    def layout(self, page_size: int) -> CacheLayout:
        """The planes that `forward` reads and writes."""

    @abstractmethod
    def prepare(self, num_positions: int) -> None:
        """Makes tables reach positions below `num_positions`; to be called before `forward`.

        Tables made before stay alive: captured graphs read them where they are.
        """

    @abstractmethod
    def forward(
        self,
        tokens: Tensor,
        cache: KVCache,
        batch: AttentionBatch,
        rows: Tensor | None = None,
        want: tuple[int, ...] = (),
    ) -> Output:
        """tokens [T] int64 -> logits of all tokens, or of the tokens `rows` [N] int64. Writes all T to the cache.

        `want` lists layer counts: k asks for the hidden state after k layers, before the final norm (0: the embeddings;
        the numbering of hidden_states in transformers). An empty one costs nothing.
        """
