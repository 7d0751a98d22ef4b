"""The shapes and constants of a trained drafter, as data."""

from __future__ import annotations

from dataclasses import dataclass

from paceline.errors import BadDrafter
from paceline.models.config import ModelConfig

KINDS = ("eagle3", "dflash")


@dataclass(frozen=True)
class DraftConfig:
    """One trained drafter. Tensors have the names that speculators gives them (drafters/checkpoint.py reads other styles).

    kind                EAGLE-3 (Li et al. 2025, arXiv 2503.01840) or DFlash (arXiv 2602.06036), with DSpark's heads
                        (arXiv 2607.05147) where `markov_rank` or `confidence_head` says so
    layer               shapes, norms and rotary positions of its layers; `vocab_size` and `max_positions` are the target's
    features            layers of the target whose hidden states it reads, as `Model.forward` numbers them
    target_hidden_size  of those states
    draft_vocab_size    tokens that it can draft; `d2t` maps them to the target's where they are fewer
    target_digest       `Checkpoint.identity` of the target that it was trained for; "" where that is not known
    vocabulary_digest   of the target's tokens (drafters/checkpoint.py, `vocabulary_digest`); "" where that is not known

    EAGLE-3: norm_before_residual adds the normalised hidden state to the residual, else the state itself; norm_before_fc
    normalises all features together, fc_norm each layer's; norm_output feeds the normalised state to the next step.
    DFlash: a block is the anchor (the last known token) and block_size - 1 times `mask_token`. With sample_from_anchor
    the anchor's row predicts a token too, block_size in all; else block_size - 1 are drafted.
    """

    kind: str
    layer: ModelConfig
    features: tuple[int, ...]
    target_hidden_size: int
    draft_vocab_size: int
    target_digest: str = ""
    vocabulary_digest: str = ""
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    block_size: int = 0
    mask_token: int = -1
    sample_from_anchor: bool = False
    markov_rank: int = 0
    confidence_head: bool = False

    def __post_init__(self) -> None:
        """Raises BadDrafter for values that no drafter can have."""
        layer = self.layer
        checks = (
            (self.kind in KINDS, f"its kind is {self.kind!r}, not one of {', '.join(KINDS)}"),
            (self.kind != "eagle3" or layer.num_layers == 1, f"an EAGLE-3 drafter of {layer.num_layers} layers"),
            (
                0 < self.draft_vocab_size <= layer.vocab_size,
                f"a draft vocabulary of {self.draft_vocab_size} of {layer.vocab_size} tokens",
            ),
            (bool(self.features) and min(self.features, default=0) >= 0, f"it reads the layers {self.features}"),
            (not (self.norm_before_fc and self.fc_norm), "norm_before_fc and fc_norm exclude each other"),
            (self.kind != "dflash" or self.block_size >= 2, f"a block of {self.block_size} tokens"),
            (
                self.kind != "dflash" or 0 <= self.mask_token < layer.vocab_size,
                f"the mask token {self.mask_token} is not in the vocabulary of {layer.vocab_size}",
            ),
        )
        for holds, message in checks:
            if not holds:
                raise BadDrafter(f"this drafter cannot be used: {message}")

    @property
    def num_drafted(self) -> int:
        """The tokens that a DFlash block drafts."""
        return self.block_size - (not self.sample_from_anchor)
