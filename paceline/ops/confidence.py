"""The confidence head of a block drafter: how likely each of its tokens is to be accepted (DSpark, arXiv 2607.05147)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, logsigmoid

from paceline.ops.dispatch import implementation
from paceline.ops.join_drafts import Guesses

LEAST_REST = 1e-6  # probability that a first candidate's own leaves to the others


@dataclass(frozen=True)
class ConfidenceHead:
    """weight [1, H + R] and bias [1] of a logit; embedding [V, R] of the token before, None where R is 0."""

    weight: Tensor
    bias: Tensor
    embedding: Tensor | None

    def logits(self, states: Tensor, before: Tensor) -> Tensor:
        """[T] float32, of states [T, H] and the tokens [T] before those that are drafted."""
        inputs = states if self.embedding is None else torch.cat([states, self.embedding[before]], dim=-1)
        return linear(inputs.float(), self.weight.float(), self.bias.float())[:, 0]


def confidence(guesses: Guesses, roots: Tensor, states: Tensor, head: ConfidenceHead) -> Tensor:
    """The log-probabilities [B, K, C] float32 of guesses of that shape, the first candidate's being what the head says.

    The others share the rest in proportion to their own. states [K * B, H] are those that the guesses follow from, depth by
    depth; the token before is the root [B], then the first candidate.
    """
    result: Tensor = implementation("confidence", states)(guesses, roots, states, head)
    return result


def reference(guesses: Guesses, roots: Tensor, states: Tensor, head: ConfidenceHead) -> Tensor:
    before = torch.cat([roots[:, None], guesses.tokens[:, :-1, 0]], dim=1).T
    logit = head.logits(states, before.flatten()).view(before.shape).T[:, :, None]
    first, others = guesses.logprobs[:, :, :1], guesses.logprobs[:, :, 1:]
    rest = torch.log1p(-first.exp().clamp(max=1 - LEAST_REST))
    return torch.cat([logsigmoid(logit), others - rest + logsigmoid(-logit)], dim=2)
