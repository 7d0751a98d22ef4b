"""What drafters with a network of their own share: its checkpoint, the target's embedding and head, and draft tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from paceline.config import ResolvedConfig
from paceline.drafters.base import DraftBatch, Drafter, drafter_class
from paceline.drafters.checkpoint import DraftCheckpoint, check_target, read_checkpoint
from paceline.drafters.chooser import NOTHING_COPIED, Guessed
from paceline.drafters.trees import Trees
from paceline.errors import BadDrafter, ConfigError
from paceline.models.base import Model
from paceline.models.rope import rope_table
from paceline.ops.choose import TokenBias, choose
from paceline.ops.copy_draft import CopyState, copy_draft
from paceline.ops.draft import DRAFTED, FROM_MODEL, Draft
from paceline.ops.join_drafts import MAX_NODES, Guesses
from paceline.ops.layout import owners
from paceline.ops.weight import Dense, Float8, Weight, prepare, row_scaled, takes_float8


class TrainedDrafter(Drafter):
    """A drafter read from `config.draft_model`. Subclasses set `kind`.

    embedding [V, H] is the target's or its own; `draft_tokens` [draft vocabulary] int64 are the target's tokens for its own,
    None where they are the same.
    """

    kind = ""
    most_guesses = 10  # tokens of a tree's paths at most; later ones are seldom reached
    one_pass = False  # whether `guess` takes one pass of the network and a place a depth, however many beams
    candidates_each = 3  # of each row of a tree
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
        if "lm_head.weight" not in self._tensors:
            self._tensors["lm_head.weight"] = model.head_rows(self.draft_tokens)
        layer = checkpoint.config.layer
        slack = 2 * (config.max_draft + 1)
        self.rope = rope_table(layer, config.max_context + slack).to(self.device)
        if self.one_pass:
            self.most_guesses = self.draft_config.num_drafted  # the last one costs little more than the first
        self.trees: Trees | None = None
        if not config.deterministic:
            self.trees = Trees(self, self.most_guesses)
            self.lengths = (0, *self.trees.shapes)
            self._no_copies = CopyState.empty(config.max_batch + 1, self.device)

    def take_tensors(self) -> dict[str, Tensor]:
        """The network's tensors, its own head or the target's among them. They are not kept: it holds its own, packed."""
        tensors, self._tensors = self._tensors, {}
        return tensors

    def guessed(self, length: int) -> Guessed:
        return Guessed(length) if self.trees is None or length >= MAX_NODES else self.trees.guessed(length)

    def guess(self, batch: DraftBatch, depth: int, width: int, beams: int = 1) -> Guesses:
        """Guesses of the `depth` tokens after each request's root, `width` candidates each; depth is below `max_query`.

        Of each depth's candidates the best `beams` are continued, for which the request needs (depth - 1) * beams places
        after its root, or `depth` with `one_pass`.
        """
        raise NotImplementedError

    def propose(self, batch: DraftBatch) -> Draft:
        """A tree of guesses. It is a chain where it has more tokens than a tree may, and in deterministic mode, whose kernels
        sum keys in the order of their places.
        """
        if self.trees is None or batch.max_query > MAX_NODES:
            return self.propose_chain(batch)
        roots = copy_draft(batch.state, self._no_copies, batch.slots, batch.query_starts, batch.num_queries, 0)
        return self.trees.propose(batch, roots, self._no_copies)

    def propose_chain(self, batch: DraftBatch) -> Draft:
        roots, depth = roots_of(batch), batch.max_query - 1
        drafted = self.guess(batch, depth, 1).tokens[:, :, 0] if depth else roots.new_empty(len(roots), 0)
        return chain(roots, drafted, batch.query_starts, batch.num_queries)

    def choose(
        self,
        batch: DraftBatch,
        logits: Tensor,
        positions: Tensor,
        guesses: Guesses,
        depth: int,
        bias: TokenBias | None = None,
    ) -> Tensor:
        """Writes what logits [B, draft vocabulary] give for `depth` into `guesses`; the first token [B] of each request.

        Where a request has a temperature, the first token is drawn by the noise that the target draws with at positions [B]
        (ops/draw.py): the target then chooses the same one about as often as their distributions overlap.
        """
        found, logprobs = guesses.tokens[:, depth], guesses.logprobs[:, depth]
        return choose(logits, batch.slots, positions, batch.draws, self.draft_tokens, found, logprobs, bias)

    def candidates(
        self,
        batch: DraftBatch,
        logits: Tensor,
        slots: Tensor,
        positions: Tensor,
        beams: int = 1,
        bias: TokenBias | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Tokens and log-probabilities [T * beams, candidates_each] of logits [T, draft vocabulary], as `choose` writes them.

        slots and positions [T] are the rows' own: a request may have several. `beams` rows share one of the logits.
        """
        shape = (len(logits) * beams, self.candidates_each)
        found = torch.empty(shape, dtype=torch.int64, device=logits.device)
        logprobs = torch.empty_like(found, dtype=torch.float32)
        choose(logits, slots, positions, batch.draws, self.draft_tokens, found, logprobs, bias)
        return found, logprobs


def empty_guesses(batch: DraftBatch, depth: int, width: int) -> Guesses:
    """Guesses of that shape for `TrainedDrafter.choose` to write."""
    tokens = torch.empty(len(batch.slots), depth, width, dtype=torch.int64, device=batch.slots.device)
    return Guesses(tokens, torch.empty_like(tokens, dtype=torch.float32))


def empty_tree(batch: DraftBatch, depth: int, width: int) -> Guesses:
    """The same for `ops.beams.extend_beams`."""
    guesses = empty_guesses(batch, depth, width)
    parents = torch.empty_like(guesses.tokens, dtype=torch.int32)
    return replace(guesses, parents=parents, chain=torch.empty_like(parents[:, :, 0]))


def unpacked(matrix: Tensor, bias: Tensor | None = None, *, gated: bool = False) -> Dense:
    """What `ops.weight.prepare` gives where gradients must flow to the matrix."""
    return Dense(matrix, bias)


def rounded(matrix: Tensor, bias: Tensor | None = None, *, gated: bool = False) -> Weight:
    """What `ops.weight.prepare` gives, in float8 where the kernels take it: half as much to read in every pass of a draft.

    The passes of a draft wait for each other and for their weights, and in float8 most of these stay in the GPU's L2 cache from
    pass to pass. A draft is a guess, so this rounding can cost acceptance and nothing else; matrices that come from a float8
    file it leaves as they are, and so `fc` is rounded too, though it runs but once a step.
    """
    if takes_float8(matrix):
        return Float8(*row_scaled(matrix), bias)
    return prepare(matrix, bias, gated=gated)


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
    is_drafted = depths.clamp(max=1)
    return Draft(tokens, depths, is_drafted * (DRAFTED | FROM_MODEL), branch_starts=is_drafted)
