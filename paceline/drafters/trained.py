"""What drafters with a network of their own share: its checkpoint, the target's embedding and head, and draft tokens."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from paceline.config import ResolvedConfig
from paceline.drafters.base import DraftBatch, Drafter, drafter_class
from paceline.drafters.checkpoint import DraftCheckpoint, check_target, read_checkpoint
from paceline.drafters.chooser import NOTHING_COPIED, Guessed
from paceline.errors import BadDrafter, ConfigError
from paceline.models.base import Model
from paceline.models.rope import rope_table
from paceline.ops.candidates import candidates, put_first
from paceline.ops.draft import DRAFTED, FROM_MODEL, Draft
from paceline.ops.draw import draw
from paceline.ops.join_drafts import Guesses
from paceline.ops.layout import owners
from paceline.ops.weight import Dense


class TrainedDrafter(Drafter):
    """A drafter read from `config.draft_model`. Subclasses set `kind`.

    embedding [V, H] is the target's or its own; `draft_tokens` [draft vocabulary] int64 are the target's tokens for its own,
    None where they are the same.
    """

    kind = ""
    most_guesses = 10  # tokens of a joint draft's chain at most; later ones are seldom reached
    model_priors = (0.6, 0.75)  # a little below what `python -m benchmarks.speculate` gives on coding prompts
    probes = True
    priors = NOTHING_COPIED

    def __init__(self, config: ResolvedConfig, model: Model, checkpoint: DraftCheckpoint | None = None) -> None:
        """`checkpoint` is what `read_trained` gives, where that is at hand. Raises BadDrafter for one that does not fit."""
        super().__init__(config, model)
        checkpoint = checkpoint or read_trained(config, model)
        if checkpoint.config.kind != self.kind:
            raise BadDrafter(f"{config.draft_model} is a drafter of kind {checkpoint.config.kind}, not {self.kind}")
        check_target(checkpoint, model.config, model.identity, config.force_drafter, model.vocabulary)
        self.draft_config = checkpoint.config
        self.features = checkpoint.config.features
        self._tensors = {name: each.to(self.device, model.dtype) for name, each in checkpoint.tensors.items()}
        self.embedding: Tensor = self._tensors.pop("embed_tokens.weight", model.embedding)
        self.draft_tokens = None if checkpoint.draft_tokens is None else checkpoint.draft_tokens.to(self.device)
        self.head = None if "lm_head.weight" in self._tensors else model.head_rows(self.draft_tokens)
        layer = checkpoint.config.layer
        slack = 2 * (config.max_draft + 1)
        self.rope = rope_table(layer, config.max_context + slack).to(self.device)

    def take_tensors(self) -> dict[str, Tensor]:
        """The network's tensors, which are not kept: it holds its own, packed for the device."""
        tensors, self._tensors = self._tensors, {}
        return tensors

    def guessed(self, length: int) -> Guessed:
        return Guessed(length)

    def guess(self, batch: DraftBatch, depth: int, width: int) -> Guesses:
        """Guesses of the `depth` tokens after each request's root, `width` candidates each; depth is below `max_query`."""
        raise NotImplementedError

    def propose(self, batch: DraftBatch) -> Draft:
        roots, depth = roots_of(batch), batch.max_query - 1
        drafted = self.guess(batch, depth, 1).tokens[:, :, 0] if depth else roots.new_empty(len(roots), 0)
        return chain(roots, drafted, batch.query_starts, batch.num_queries)

    def choose(self, batch: DraftBatch, logits: Tensor, positions: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """A level of `Guesses`: tokens and log-probabilities [B, width] from logits [B, draft vocabulary].

        Where a request has a temperature, the first token is drawn by the noise that the target draws with at positions [B]
        (ops/draw.py): the target then chooses the same one about as often as their distributions overlap.
        """
        found, logprobs = candidates(logits, width)
        best = found[:, 0].contiguous()
        drawn = draw(logits, best, batch.slots, positions, batch.draws, self.draft_tokens)
        return put_first(found, drawn, self.draft_tokens), logprobs


def unpacked(matrix: Tensor, bias: Tensor | None = None, *, gated: bool = False) -> Dense:
    """What `ops.weight.prepare` gives where gradients must flow to the matrix."""
    return Dense(matrix, bias)


def read_trained(config: ResolvedConfig, model: Model) -> DraftCheckpoint:
    """The checkpoint at `config.draft_model`. Raises ConfigError where that is not set, BadDrafter for a damaged one."""
    if config.draft_model is None:
        raise ConfigError(f"the drafter {config.drafter!r} needs draft_model, the path of a trained drafter")
    return read_checkpoint(Path(config.draft_model), model.config.num_layers)


def load_trained(config: ResolvedConfig, model: Model) -> TrainedDrafter:
    """The drafter at `config.draft_model`, of whatever kind that is."""
    checkpoint = read_trained(config, model)
    return cast(TrainedDrafter, drafter_class(checkpoint.config.kind)(config, model, checkpoint))


def roots_of(batch: DraftBatch) -> Tensor:
    """The last known token [B] int64 of each request."""
    state, slots = batch.state, batch.slots
    return state.text[slots, state.end[slots].long() - 1].long()


def chain(roots: Tensor, drafted: Tensor, query_starts: Tensor, num_queries: int) -> Draft:
    """The Draft of one chain a request: roots [B], drafted [B, L] tokens, of which each request takes as many as it has
    queries, less one.
    """
    every = torch.cat([roots[:, None], drafted], dim=1)
    owner = owners(query_starts, num_queries)
    depths = torch.arange(num_queries, dtype=torch.int32, device=roots.device) - query_starts[owner]
    tokens = every[owner, depths.long()]
    is_drafted = (depths > 0).int()
    return Draft(tokens, depths, is_drafted * (DRAFTED | FROM_MODEL), branch_starts=is_drafted)
