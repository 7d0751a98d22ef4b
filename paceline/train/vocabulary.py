"""The draft vocabulary: the target's tokens that a drafter can draft."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from paceline.errors import ConfigError
from paceline.train.samples import Sample


def draft_vocabulary(samples: Iterable[Sample], size: int, vocab_size: int, always: Sequence[int]) -> tuple[Any, float]:
    """`size` tokens [size] int64, ascending, and the share of supervised tokens that are among them.

    Those that outputs hold most often, then those that prompts do; `always` (the tokens that end an output) are among them.
    Raises ConfigError for a size that the vocabulary does not have.
    """
    if not len(always) < size <= vocab_size:
        raise ConfigError(f"a draft vocabulary of {size} tokens is not possible with {vocab_size} tokens")
    outputs, every = np.zeros(vocab_size, np.int64), np.zeros(vocab_size, np.int64)
    for sample in samples:
        np.add.at(every, sample.tokens, 1)
        for first, last in sample.spans:
            np.add.at(outputs, sample.tokens[first:last], 1)
    # by count in outputs, then in all, then by id: the order must not depend on the order of samples
    order = np.lexsort((np.arange(vocab_size), -every, -outputs))
    order = np.concatenate([np.array(always, np.int64), order[~np.isin(order, always)]])
    chosen = np.sort(order[:size])
    return chosen, float(outputs[chosen].sum() / max(1, outputs.sum()))


def vocabulary_share(samples: Iterable[Sample], draft_tokens: Any) -> float:
    """The share of supervised tokens that are among `draft_tokens` [size] int64."""
    inside = total = 0
    for sample in samples:
        for first, last in sample.spans:
            inside += int(np.isin(sample.tokens[first:last], draft_tokens).sum())
            total += last - first
    return inside / max(1, total)
