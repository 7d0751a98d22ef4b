"""Losses between a drafter's and its target's distributions, and what an engine would accept of its drafts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from paceline.errors import ConfigError

KINDS = ("kl", "tv", "lk", "ce")


@dataclass(frozen=True)
class Objective:
    """What training minimises, over the drafted positions k = 0, 1, ... with weights decay**k that sum to 1.

    kl   cross entropy to the target's distribution over the draft vocabulary (EAGLE-3). A row whose first choice of the
         target cannot be drafted is left out
    tv   1 - sum of min(p, q), the rate at which sampled drafts are refused
    lk   share * kl + (1 - share) * tv, share = exp(-kl_decay * mean acceptance): from kl at first towards tv
         (LK losses, arXiv 2602.23881)
    ce   cross entropy to the target's first choice
    """

    kind: str = "kl"
    decay: float = 0.8
    kl_decay: float = 3.0

    def __post_init__(self) -> None:
        """Raises ConfigError for a kind or a decay that there is not."""
        if self.kind not in KINDS:
            raise ConfigError(f"the loss must be one of {', '.join(KINDS)}, not {self.kind!r}")
        if not 0 < self.decay <= 1 or self.kl_decay < 0:
            raise ConfigError("a loss's decay must be above 0 and at most 1, and its kl_decay 0 or more")

    def weights(self, count: int) -> list[float]:
        """Weights of `count` positions."""
        powers = [self.decay**k for k in range(count)]
        return [power / sum(powers) for power in powers]


class RowResults(NamedTuple):
    """For each of N rows: the losses, sum of min(p, q), and whether both have the same first choice. All [N] float32."""

    kl: Tensor
    refused: Tensor
    cross_entropy: Tensor
    matches: Tensor


def compare(logits: Tensor, target: Tensor, normaliser: Tensor, choice: Tensor) -> RowResults:
    """logits [N, Vd] of the drafter against target [N, Vd], normaliser [N] and choice [N] of `Captured`."""
    if logits.device.type != "cuda":
        return compare_reference(logits, target, normaliser, choice)
    from paceline.ops.triton.compare import Compare  # Triton is there only where CUDA is

    return RowResults(*Compare.apply(logits, target, normaliser, choice))


def compare_reference(logits: Tensor, target: Tensor, normaliser: Tensor, choice: Tensor) -> RowResults:
    """`compare` in torch: its definition."""
    log_q = logits.float().log_softmax(-1)
    p = (target.float() - normaliser[:, None]).exp()
    inside = (choice >= 0).float()
    kl = -(p * log_q).sum(-1) / p.sum(-1).clamp(min=1e-9) * inside
    refused = 1 - torch.minimum(p, log_q.exp()).sum(-1)
    hard = -log_q.gather(-1, choice.clamp(min=0)[:, None])[:, 0] * inside
    matches = (logits.detach().argmax(-1) == choice).float()
    return RowResults(kl, refused, hard, matches)


def mixed(objective: Objective, rows: RowResults, weights: Tensor) -> Tensor:
    """The sum over rows of the objective's loss, each by its weight."""
    if objective.kind == "tv":
        return (rows.refused * weights).sum()
    if objective.kind == "ce":
        return (rows.cross_entropy * weights).sum()
    loss = (rows.kl * weights).sum()
    if objective.kind == "lk":
        refused = (rows.refused * weights).sum()
        rate = 1 - refused.detach() / weights.sum().clamp(min=1)
        share = torch.exp(-objective.kl_decay * rate)
        loss = share * loss + (1 - share) * refused
    return loss


NUM_COUNTS = 6


class Acceptance:
    """Counts over drafted positions and tasks, [tasks, K, NUM_COUNTS] float64-able sums on the device.

    Of each position: rows, first choices that match, the sum of min(p, q), drafts whose tokens so far were all right,
    those of them that are right here too, and the loss. Rows read the text's own tokens. So a draft goes on only where its
    token is the target's first choice and the text's token as well: in texts drawn at a temperature the two can differ.
    """

    def __init__(self, num_tasks: int, num_positions: int, device: torch.device) -> None:
        self.counts = torch.zeros(num_tasks, num_positions, NUM_COUNTS, dtype=torch.float64, device=device)
        self._alive: Tensor | None = None

    def add(self, position: int, rows: RowResults, weights: Tensor, continues: Tensor, tasks: Tensor) -> None:
        """Adds position k of a batch, in the order of k. `weights` [N] is 0 where no draft reaches the row at k;
        `continues` [N] is that of `Captured`.

        A draft that begins at place r is at place r + k for position k, so one place on is one entry on in [N].
        """
        matches, weights = rows.matches.detach() * weights, weights.detach()
        if position == 0:
            tried = weights
        else:
            assert self._alive is not None
            tried = self._alive.roll(1) * continues * weights
        self._alive = tried * matches
        overlap = (1 - rows.refused.detach()) * weights
        loss = rows.kl.detach() * weights
        columns = torch.stack([weights, matches, overlap, tried, self._alive, loss], -1)
        self.counts[:, position].index_add_(0, tasks, columns.to(torch.float64))

    def add_drafts(self, rows: RowResults, weights: Tensor, continues: Tensor, tasks: Tensor) -> None:
        """Adds A whole drafts of up to K tokens: `rows` [A, K]; `weights` [A, K] 1, and 0 from a draft's end on;
        `continues` [A, K] those of `Captured` at the rows; tasks [A].
        """
        matches, weights = rows.matches.detach() * weights, weights.detach()
        alive = (matches[:, :-1] * continues[:, 1:]).cumprod(1)
        tried = torch.cat([weights[:, :1], alive * weights[:, 1:]], 1)
        accepted = tried * matches
        overlap, loss = (1 - rows.refused.detach()) * weights, rows.kl.detach() * weights
        columns = torch.stack([weights, matches, overlap, tried, accepted, loss], -1)
        self.counts[:, : weights.shape[1]].index_add_(0, tasks, columns.to(torch.float64))


def summary(counts: Tensor) -> dict[str, list[float] | float]:
    """Rates of counts [K, NUM_COUNTS] on the host.

    acceptance   of each position, the share of first choices that match, given that those before did
    matches      the same over all rows, whatever came before
    overlap      the mean of sum min(p, q): the acceptance of sampled drafts
    length       1 + the expected number of accepted drafts: the target's own token counts
    """
    rows, matches, overlap, tried, accepted, loss = counts.double().unbind(-1)
    rates = accepted / tried.clamp(min=1)
    return {
        "length": round(1 + float(rates.cumprod(0).sum()), 4),
        "acceptance": [round(each, 4) for each in rates.tolist()],
        "matches": [round(each, 4) for each in (matches / rows.clamp(min=1)).tolist()],
        "overlap": [round(each, 4) for each in (overlap / rows.clamp(min=1)).tolist()],
        "loss": [round(each, 4) for each in (loss / rows.clamp(min=1)).tolist()],
    }


def summaries(counts: Tensor, tasks: Sequence[str]) -> dict[str, Any]:
    """The summary of each task in counts [tasks, K, NUM_COUNTS] on the host; tasks without a row are left out."""
    return {task: summary(each) for task, each in zip(tasks, counts, strict=True) if each[0, 0] > 0}
