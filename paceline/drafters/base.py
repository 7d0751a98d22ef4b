"""The drafter interface: a drafter proposes tokens for a step's requests and observes which ones the target accepted.

To add one: a class here beside `copy.py`, a row in `config.DRAFTERS`, and the contract of tests/drafters, which runs over
all rows: output with it equals output without it.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from paceline.config import DRAFTERS, TRAINED, ResolvedConfig
from paceline.drafters.chooser import COPY_PRIORS, NOT_GUESSED, Guessed, Priors
from paceline.drafters.shipped import shipped_drafter
from paceline.kv.cache import KVCache
from paceline.kv.layout import CacheLayout
from paceline.models.base import Model
from paceline.ops.attention import AttentionBatch
from paceline.ops.draft import Draft
from paceline.ops.draw import Draws
from paceline.ops.state import SlotState
from paceline.ops.verify import Verified


@dataclass
class DraftBatch:
    """The B requests of a step, on the device.

    slots [B] int64: their rows in `state` and `page_table` [S, P] int32; query_starts [B + 1] int32: where each request's
    queries start among the step's `num_queries`. A request drafts as many tokens as it has queries, less one; `max_query` is
    the most that one has. On CUDA all have the same number. `draws` is how the slots draw their tokens.
    """

    state: SlotState
    slots: Tensor
    query_starts: Tensor
    num_queries: int
    max_query: int
    page_table: Tensor
    cache: KVCache
    draws: Draws

    @property
    def is_uniform(self) -> bool:
        """Whether all requests have the same number of queries; always on CUDA."""
        return self.num_queries == len(self.slots) * self.max_query


class Drafter(ABC):
    """Proposes drafts on the device. Each engine has one; slots are those of `DraftBatch.state`.

    lengths      draft lengths that it may be asked for, ascending, 0 first; a subset of range(MAX_DRAFT + 1)
    features     layers of the target whose hidden states `remember` wants, as `Model.forward` numbers them
    uses_sources whether it reads a request's explicit sources; they are not put into the text otherwise
    priors       acceptance by state of agreement that the chooser assumes before it has seen any
    model_priors the same for the tokens marked FROM_MODEL, None where it marks none
    probes       whether to draft now and then where it does not seem to pay: for one that learns from its drafts alone
    records_guesses  whether `observe` writes GUESS_CORRECT after steps without drafts too, for the chooser to learn from

    `propose`, `remember` and `observe` run on CUDA within captured graphs: shapes depend on the batch's shapes alone, and
    nothing waits for the device. With `config.deterministic` a drafter proposes a single chain on CUDA: kernels there sum
    keys in the order of their places, which in other trees is not plain decoding's.
    """

    lengths: tuple[int, ...] = (0,)
    features: tuple[int, ...] = ()
    uses_sources: bool = False
    records_guesses: bool = False
    priors: Priors = COPY_PRIORS
    model_priors: tuple[float, float] | None = None
    probes: bool = False

    def __init__(self, config: ResolvedConfig, model: Model) -> None:
        self.config = config
        self.device = model.device

    def guessed(self, length: int) -> Guessed:
        """What a trained drafter gives for a draft of `length`: its chain's tokens are marked FROM_MODEL."""
        return NOT_GUESSED

    def layout(self, page_size: int) -> CacheLayout:
        """The planes that it keeps in the cache beside the target's; none by default."""
        return CacheLayout(page_size)

    def start(self, slot: int, num_source_tokens: int, is_new: bool) -> int:
        """A request has taken `slot`, and its text is written: `num_source_tokens` of sources and separators first.

        `is_new` is False for one that was preempted and has output already. Returns the tokens of agreement with the
        text to assume for the chooser.
        """
        return 0

    @abstractmethod
    def propose(self, batch: DraftBatch) -> Draft:
        """Each request's root and drafted tokens; padding where it has fewer tokens to propose than queries."""

    def remember(
        self, tokens: Tensor, features: Tensor, draft: Draft | None, batch: AttentionBatch, cache: KVCache
    ) -> None:
        """After a pass of the target over tokens [T], of prompts and of drafts: writes its planes at `batch.locations`.

        features [T, F * H] are the hidden states asked for. `draft` is what the pass verifies, whose tree says which token
        comes before each; None for prompts. What it writes for a token must follow from the tokens up to that one: pages are
        shared by prompts with the same beginning, and accepted tokens are moved with all planes.
        """
        raise NotImplementedError("a drafter that asks for features must keep something of them")

    def observe(self, batch: DraftBatch, draft: Draft, verified: Verified) -> None:
        """Sees what was accepted, after `state` has moved on; may write the record of acceptance for the chooser.

        That record is the columns STREAK (tokens of agreement with the text that lead to the next draft, 0 for none) and
        GUESS_CORRECT (1 where its first guess was right, drafted or not) of `verified.result`.
        """
        return


class NoDrafter(Drafter):
    """Plain decoding: the root alone."""

    def propose(self, batch: DraftBatch) -> Draft:
        assert batch.num_queries == len(batch.slots)
        state, slots = batch.state, batch.slots
        tokens = state.text[slots, state.end[slots].long() - 1].long()
        zeros = torch.zeros(len(slots), dtype=torch.int32, device=tokens.device)
        return Draft(tokens, zeros, zeros, branch_starts=zeros)


def make_drafter(config: ResolvedConfig, model: Model) -> Drafter:
    """The drafter that the configuration names."""
    return cast(Drafter, drafter_class(config.drafter)(config, model))


def with_drafter(config: ResolvedConfig, model: Model) -> ResolvedConfig:
    """`config` with a choice for "auto", and the trained drafter that comes with Paceline where none is given.

    "auto" is joint where there is a trained drafter for the model, else copy. In deterministic mode it is copy: a joint draft
    is a tree, which is not plain decoding's bit by bit (see `Drafter`).
    """
    if config.drafter == "auto" and config.deterministic:
        return replace(config, drafter="copy", draft_model=None)
    if config.drafter in ("auto", *TRAINED) and config.draft_model is None and model.identity:
        found = shipped_drafter(model.identity)
        config = replace(config, draft_model=None if found is None else str(found))
    if config.drafter == "auto":
        return replace(config, drafter="copy" if config.draft_model is None else "joint")
    return config


def drafter_class(name: str) -> Any:
    """The class in a row of `config.DRAFTERS`."""
    module, attribute = DRAFTERS[name].split(":")
    return getattr(importlib.import_module(module), attribute)
