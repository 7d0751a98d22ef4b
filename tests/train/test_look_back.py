"""The first weights of a block drafter's attention."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from paceline.models.rope import rope_table
from paceline.ops.linear import rms_norm
from paceline.ops.rope import rotate
from paceline.train.dflash import BlockShape, dflash_config
from paceline.train.look_back import look_back
from tests.tiny import tiny_config


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(8, 8), (8, 2)])
def test_half_of_the_heads_see_the_tokens_just_before(num_heads: int, num_kv_heads: int) -> None:
    torch.manual_seed(0)
    width, dim, count = 256, 64, 200
    target = tiny_config(num_layers=6, hidden_size=width, num_heads=num_heads, num_kv_heads=1, head_dim=dim)
    shape = BlockShape(num_layers=2, num_kv_heads=num_kv_heads)
    config = dflash_config(dataclasses.replace(target, rope_theta=1e5), "", 16, 48, 0, shape)
    states = torch.randn(width) + 0.8 * torch.randn(count, width)  # the target's states have much in common
    rows = 0.5 * torch.randn(width) + torch.randn(count, width)  # embeddings have less
    ones = torch.ones(width)
    states, rows = rms_norm(states, ones, 1e-6), rms_norm(rows, ones, 1e-6)
    tensors = {
        f"layers.{index}.self_attn.{name}_proj.weight": torch.randn(heads * dim, width) / width**0.5
        for index in range(2)
        for name, heads in (("q", num_heads), ("k", num_kv_heads))
    }
    random = {name: each.clone() for name, each in tensors.items()}
    look_back(tensors, config, states, rows)

    table = rope_table(config.layer, count)[:, None, :].chunk(2, dim=-1)
    for index in range(2):
        heads = {}
        for name, inputs in (("q", rows), ("k", states)):
            matrix = tensors[f"layers.{index}.self_attn.{name}_proj.weight"]
            made = rms_norm((inputs @ matrix.T).view(count, -1, dim), torch.ones(dim), 1e-6)
            heads[name] = rotate(made, *table)
        keys = heads["k"].repeat_interleave(num_heads // num_kv_heads, 1)
        scores = torch.einsum("qhd,khd->hqk", heads["q"], keys) / dim**0.5
        before = torch.ones(count, count).tril(-1).bool()
        weights = scores.masked_fill(~before, -torch.inf)[:, 50:].softmax(-1)
        last = torch.stack([weights.diagonal(49 - back, 1, 2) for back in range(4)], -1).mean(1)  # [heads, 4]
        looking = num_heads // 2
        assert (last[:looking].sum(-1) > 0.5).all(), last[:looking]
        assert (last[:looking, 0] > last[:looking, 3]).all()
        assert (last[looking:].sum(-1) < 0.2).all(), "the other heads stay as they were"
    for name, each in tensors.items():
        half = len(each) // 2
        assert torch.equal(each[half:], random[name][half:])
