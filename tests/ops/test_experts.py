"""The ways to compute a mixture of experts against the plainest formula, a token and an expert at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from paceline.ops import experts as module
from paceline.ops.dispatch import deterministic
from paceline.ops.experts import experts, route
from paceline.ops.weight import ExpertWeights, prepare_experts

EXPERTS, ACTIVE, WIDTH, INNER = 6, 2, 32, 24


def weights(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(EXPERTS, 2 * INNER, WIDTH).to(dtype) / 4, torch.randn(EXPERTS, WIDTH, INNER).to(dtype) / 4


def prepared(dtype: torch.dtype) -> tuple[ExpertWeights, ExpertWeights]:
    gate_up, down = weights(dtype)
    return prepare_experts(gate_up, gated=True), prepare_experts(down)


def plainly(x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
    gate_up, down = (each.double() for each in weights(x.dtype))
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token, (row, part) in enumerate(zip(chosen.tolist(), shares.tolist(), strict=True)):
        for expert, share in zip(row, part, strict=True):
            gate, up = (gate_up[expert] @ x[token].double()).chunk(2)
            out[token] += share * (down[expert] @ (F.silu(gate) * up))
    return out


def routed(count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(count)
    chosen, shares = route(torch.randn(count, EXPERTS).to(dtype) * 2, ACTIVE, True)
    return torch.randn(count, WIDTH).to(dtype), chosen, shares


@pytest.mark.parametrize("renormalise", [False, True])
def test_routing(renormalise: bool) -> None:
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.7, 0.1, 0.15, 0.05]]))
    chosen, shares = route(logits, 2, renormalise)
    assert chosen.tolist() == [[1, 3], [0, 2]]
    expected = torch.tensor([[4 / 7, 3 / 7], [0.7 / 0.85, 0.15 / 0.85]] if renormalise else [[0.4, 0.3], [0.7, 0.15]])
    torch.testing.assert_close(shares, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2, 33])
@pytest.mark.parametrize("way", ["experts", "fixed_shapes", "grouped"])
def test_every_way_is_the_formula(way: str, count: int, dtype: torch.dtype) -> None:
    x, chosen, shares = routed(count, dtype)
    gate_up, down = prepared(dtype)
    if way == "grouped":
        gate_up.matrix, down.matrix = weights(dtype)
    found = getattr(module, way)(x, chosen, shares, gate_up, down)
    limit = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(found.double(), plainly(x, chosen, shares), rtol=limit, atol=limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_has_the_same_bits_in_any_company_and_in_a_graph(dtype: torch.dtype) -> None:
    x, chosen, shares = routed(70, dtype)
    gate_up, down = prepared(dtype)
    with deterministic(True):
        whole = experts(x, chosen, shares, gate_up, down)
        assert torch.equal(module.fixed_shapes(x, chosen, shares, gate_up, down), whole)
        for part in (slice(0, 1), slice(5, 8), slice(20, 69)):
            assert torch.equal(experts(x[part], chosen[part], shares[part], gate_up, down), whole[part])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_a_graph_gives_the_same(dtype: torch.dtype, invariant: bool) -> None:
    x, chosen, shares = (each.cuda() for each in routed(20, dtype))
    gate_up, down = weights(dtype)
    stacks = prepare_experts(gate_up.cuda(), gated=True), prepare_experts(down.cuda())
    expected = plainly(x.cpu(), chosen.cpu(), shares.cpu())
    limit = 1e-4 if dtype == torch.float32 else 5e-2
    graph = torch.cuda.CUDAGraph()
    with deterministic(invariant), torch.inference_mode():
        eager = experts(x, chosen, shares, *stacks)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            captured = experts(x, chosen, shares, *stacks)
        for _ in range(2):
            graph.replay()
        torch.cuda.synchronize()
        if invariant:
            assert torch.equal(captured, eager)
            part = experts(x[3:5], chosen[3:5], shares[3:5], *stacks)
            assert torch.equal(part, eager[3:5])
    for found in (eager, captured):
        torch.testing.assert_close(found.double().cpu(), expected, rtol=limit, atol=limit)
