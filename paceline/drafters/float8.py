"""The small form of a drafter's file: matrices in float8, the Markov head for draft tokens alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from paceline.drafters.config import DraftConfig
from paceline.errors import BadDrafter
from paceline.ops import weight

MARKOV = "markov_head.markov_w1.weight"
_SCALE = "_scale"  # ends the name of a float8 matrix's scales


def float8_rows(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Matrices as E4M3 with a float32 scale a row, under their name and `_scale`; other tensors as they are."""
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.dim() < 2:
            stored[name] = tensor
            continue
        stored[name], stored[name + _SCALE] = weight.row_scaled(tensor)
    return stored


def expanded(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Float8 matrices as bfloat16; other tensors as they are."""
    tensors = {name: each for name, each in stored.items() if not name.endswith(_SCALE)}
    for name, tensor in tensors.items():
        if tensor.dtype == weight.FLOAT8:
            scale = stored.get(name + _SCALE)
            if scale is None or scale.shape != tensor.shape[:1]:
                raise BadDrafter(f"the drafter lacks {name + _SCALE}, a scale for each row of its float8 {name}")
            tensors[name] = weight.Float8(tensor, scale.float()).decoded(torch.bfloat16).matrix
    return tensors


def drafted_rows(tensors: dict[str, Tensor], draft_tokens: Tensor | None) -> dict[str, Tensor]:
    """The tensors with the rows of the Markov head's embedding that are of draft tokens, [draft vocabulary, R]."""
    if MARKOV not in tensors or draft_tokens is None:
        return tensors
    return {**tensors, MARKOV: tensors[MARKOV][draft_tokens]}


def all_rows(config: DraftConfig, tensors: dict[str, Tensor], draft_tokens: Tensor | None) -> dict[str, Tensor]:
    """The reverse of `drafted_rows`: rows of other tokens are 0."""
    rows = tensors.get(MARKOV)
    if rows is None or draft_tokens is None or len(rows) != len(draft_tokens):
        return tensors
    whole = rows.new_zeros(config.layer.vocab_size, *rows.shape[1:])
    whole[draft_tokens] = rows
    return {**tensors, MARKOV: whole}
