"""The experts of a mixture-of-experts layer: which experts each token takes, and the weighted sum of their results.

Experts are numbered in the order of their weights. A token's results are added in the order of its experts' numbers, each
rounded to the dtype of x, as `transformers` does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from paceline.ops.dispatch import implementation
from paceline.ops.linear import linear, linear_gated
from paceline.ops.weight import ExpertWeights


def route(logits: Tensor, count: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """logits [T, E] -> the `count` likeliest experts of each token [T, count] int64 and their weights in logits' dtype.

    Probabilities are a softmax over all experts in float32; `renormalise` divides them by the sum of those chosen.
    """
    shares, experts = logits.softmax(dim=-1, dtype=torch.float32).topk(count, dim=-1)
    if renormalise:
        shares = shares / shares.sum(dim=-1, keepdim=True)
    return experts, shares.to(logits.dtype)


def experts(x: Tensor, chosen: Tensor, shares: Tensor, gate_up: ExpertWeights, down: ExpertWeights) -> Tensor:
    """Sum over a token's chosen experts of share * down(silu(gate(x)) * up(x)). x [T, H] -> [T, H].

    chosen [T, k] int64, distinct within a token; shares [T, k] in x's dtype. The weights of `gate_up` are gated.
    """
    return implementation("experts", x)(x, chosen, shares, gate_up, down)


def reference(x: Tensor, chosen: Tensor, shares: Tensor, gate_up: ExpertWeights, down: ExpertWeights) -> Tensor:
    """One gated MLP per expert over the tokens that chose it. The host waits for the tokens' choices."""
    out = torch.zeros_like(x)
    num_chosen = chosen.shape[1]
    counts = torch.bincount(chosen.flatten(), minlength=len(gate_up.weights)).tolist()
    places = chosen.flatten().argsort(stable=True)
    for index, group in enumerate(places.split(counts)):
        if len(group):
            rows = group // num_chosen
            result = linear(linear_gated(x[rows], gate_up.weights[index]), down.weights[index])
            out.index_add_(0, rows, result * shares.flatten()[group, None])
    return out


def fixed_shapes(x: Tensor, chosen: Tensor, shares: Tensor, gate_up: ExpertWeights, down: ExpertWeights) -> Tensor:
    """`reference` with every expert over every token: shapes do not depend on the choices, so that a graph can hold it."""
    out = torch.zeros_like(x)
    for index, (wide, narrow) in enumerate(zip(gate_up.weights, down.weights, strict=True)):
        mine = chosen == index
        result = linear(linear_gated(x, wide), narrow) * (shares * mine).sum(dim=1, keepdim=True)
        out += torch.where(mine.any(dim=1, keepdim=True), result, 0)
    return out


def grouped(x: Tensor, chosen: Tensor, shares: Tensor, gate_up: ExpertWeights, down: ExpertWeights) -> Tensor:
    """Both products as one launch over all experts, their tokens side by side; the counts stay on the device."""
    assert gate_up.matrix is not None and down.matrix is not None
    num_chosen = chosen.shape[1]
    flat = chosen.flatten()
    places = flat.argsort(stable=True)
    ends = torch.searchsorted(flat[places], torch.arange(len(gate_up.weights), device=x.device), right=True).int()
    gate, up = F.grouped_mm(x[places // num_chosen], gate_up.matrix.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    result = F.grouped_mm(F.silu(gate) * up, down.matrix.transpose(1, 2), offs=ends)
    by_token = torch.empty_like(result)
    by_token[places] = result * shares.flatten()[places, None]
    return by_token.view(len(x), num_chosen, -1).sum(dim=1)


def on_cuda(x: Tensor, chosen: Tensor, shares: Tensor, gate_up: ExpertWeights, down: ExpertWeights) -> Tensor:
    """`grouped` where torch has it (bfloat16, rows of whole 16 bytes), else as `on_cuda_deterministic`."""
    aligned = all(each.matrix is not None and each.matrix.shape[2] % 8 == 0 for each in (gate_up, down))
    if aligned and x.dtype == torch.bfloat16:
        return grouped(x, chosen, shares, gate_up, down)
    return on_cuda_deterministic(x, chosen, shares, gate_up, down)


def on_cuda_deterministic(
    x: Tensor, chosen: Tensor, shares: Tensor, gate_up: ExpertWeights, down: ExpertWeights
) -> Tensor:
    """`fixed_shapes` while a graph is captured, else `reference`: the same bits where products are batch-invariant."""
    capturing = torch.cuda.is_current_stream_capturing()
    return (fixed_shapes if capturing else reference)(x, chosen, shares, gate_up, down)
