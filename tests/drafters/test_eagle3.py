"""The EAGLE-3 drafter: its drafts are those of the network run over the whole text, whatever the cache holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from paceline.config import ResolvedConfig
from paceline.drafters.base import DraftBatch
from paceline.drafters.eagle3 import Eagle3Drafter, Eagle3Network
from paceline.engine.engine import Engine
from paceline.errors import BadDrafter, ConfigError
from paceline.models.rope import rope_table
from paceline.ops.attention import AttentionBatch
from paceline.ops.draft import Draft
from paceline.ops.rope import rotate
from paceline.types import Request, Sampling
from tests.drafters.tiny_checkpoints import engine_with, tiny_eagle3
from tests.tiny import ByteTokenizer, tiny_config, tiny_engine

VARIANTS: list[dict[str, Any]] = [
    {},
    {"norm_before_residual": True, "fc_norm": True},
    {"norm_before_fc": True, "norm_output": True},
    {"layer": replace(tiny_config("qwen3"), num_layers=1, tie_embeddings=False)},
]


def drafts_of(engine: Engine, request: Request, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The tokens that are drafted in each step of a request that is alone."""
    found: list[list[int]] = []
    propose = engine.drafter.propose

    def noting(batch: DraftBatch) -> Draft:
        draft = propose(batch)
        found.append(draft.tokens[1:].tolist())
        return draft

    with monkeypatch.context() as patch:
        patch.setattr(engine.drafter, "propose", noting)
        engine.generate([request])
    return found


def dense(network: Eagle3Network, tokens: Tensor, embedding: Tensor, states: Tensor) -> Tensor:
    """The network's output for the last row, all rows before it but the first attended to: no cache, no pages."""
    layer = network.config.layer
    table, positions = rope_table(layer, 512), torch.arange(len(tokens))
    heads, kv_heads, dim = layer.num_heads, layer.num_kv_heads, layer.head_dim

    def attend(qkv: Tensor) -> Tensor:
        query, key, value = qkv.view(len(qkv), -1, dim).split([heads, kv_heads, kv_heads], dim=1)
        if network.head_norms is not None:
            of_query, of_key, eps = network.head_norms
            query, key = F.rms_norm(query, (dim,), of_query, eps), F.rms_norm(key, (dim,), of_key, eps)
        cosines, sines = table[positions][:, None, :].chunk(2, dim=-1)
        query, key = rotate(query, cosines, sines), rotate(key, cosines, sines)
        seen = torch.ones(len(tokens), len(tokens)).tril().bool()
        seen[1:, 0] = False
        return F.scaled_dot_product_attention(
            query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), attn_mask=seen, enable_gqa=True
        ).transpose(0, 1).flatten(1)  # fmt: skip

    return network.forward(tokens, embedding, states.clone(), attend)[-1:]


def naive_draft(engine: Engine, text: list[int], length: int) -> list[int]:
    """The draft after `text` from the target's hidden states of all but its last token, computed at once."""
    drafter = engine.drafter
    assert isinstance(drafter, Eagle3Drafter)
    network, embedding = drafter.network, drafter.embedding
    states = torch.zeros(1, embedding.shape[1])
    if len(text) > 1:
        states = torch.cat([states, network.fuse(hidden_states(engine, text[:-1]))])
    tokens = list(text)
    for _ in range(length):
        state = dense(network, torch.tensor(tokens), embedding, states)
        states = torch.cat([states, state])
        assert drafter.draft_tokens is not None
        tokens.append(int(drafter.draft_tokens[network.logits(state).argmax(-1)]))
    return tokens[len(text) :]


def hidden_states(engine: Engine, tokens: list[int]) -> Tensor:
    """The target's features of `tokens`, by a pass of an engine without a cache of them."""
    fresh = tiny_engine()
    count = len(tokens)
    batch = AttentionBatch(
        positions=torch.arange(count),
        locations=fresh.cache.page_size + torch.arange(count),
        page_table=torch.arange(1, 2 + count // fresh.cache.page_size, dtype=torch.int32)[None],
        context_lens=torch.zeros(1, dtype=torch.int32),
        query_starts=torch.tensor([0, count], dtype=torch.int32),
        branch_starts=torch.zeros(count, dtype=torch.int32),
        max_query=count,
        max_context=0,
    )
    features = fresh.model.forward(torch.tensor(tokens), fresh.cache, batch, want=engine.drafter.features).features
    assert features is not None
    return features


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda each: "-".join(each) or "plain")
@torch.inference_mode()
def test_drafts_are_those_of_the_network_over_the_whole_text(
    variant: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "drafter.safetensors"
    tiny_eagle3(path, tiny_config(), **variant)
    for prompt in ([7], list(range(40, 80)), [3] * 16, list(range(17)) * 3):
        engine = tiny_engine(
            drafter="eagle3", draft_model=str(path), fixed_draft=5, prefill_chunk=7, deterministic=True
        )
        request = Request(prompt, Sampling(max_tokens=12, ignore_eos=True))
        drafts = drafts_of(engine, request, monkeypatch)[1:]  # the first is at the end of the prompt
        [completion] = engine.generate([request])
        text, steps = list(prompt) + completion.tokens[:1], 0
        for draft in drafts:
            expected = naive_draft(engine, text, 5)
            assert draft == expected[: len(draft)]
            accepted = 0
            while accepted < len(draft) and draft[accepted] == [*prompt, *completion.tokens][len(text) + accepted]:
                accepted += 1
            text = ([*prompt, *completion.tokens])[: len(text) + accepted + 1]
            steps += 1
            if len(text) >= len(prompt) + len(completion.tokens) - 6:
                break  # near the end drafts are cut to the tokens that remain
        assert steps >= 2


def naive_tree(
    engine: Engine, text: list[int], depth: int, width: int, beams: int
) -> list[list[tuple[int, int, float]]]:
    """By depth: (token, candidate that it follows, its own log-probability) of the `width` best, each path alone."""
    drafter = engine.drafter
    assert isinstance(drafter, Eagle3Drafter) and drafter.draft_tokens is not None
    network, embedding = drafter.network, drafter.embedding
    states = torch.zeros(1, embedding.shape[1])
    if len(text) > 1:
        states = torch.cat([states, network.fuse(hidden_states(engine, text[:-1]))])
    paths, levels = [(0.0, list(text), states)], []
    for _ in range(depth):
        found = []
        for number, (score, tokens, states) in enumerate(paths[:beams]):
            state = dense(network, torch.tensor(tokens), embedding, states)
            chances, columns = network.logits(state)[0].log_softmax(-1).topk(3)
            for chance, column in zip(chances.tolist(), columns.tolist(), strict=True):
                token = int(drafter.draft_tokens[column])
                found.append((score + chance, [*tokens, token], torch.cat([states, state]), number, chance))
        found.sort(key=lambda each: -each[0])
        levels.append([(tokens[-1], number, chance) for _, tokens, _, number, chance in found[:width]])
        paths = [each[:3] for each in found[:width]]
    return levels


@torch.inference_mode()
def test_a_tree_is_that_of_the_network_along_each_path(tmp_path: Path) -> None:
    engine = engine_with("eagle3", tmp_path, fixed_draft=10)
    drafter, found, texts = engine.drafter, [], []
    assert isinstance(drafter, Eagle3Drafter)
    propose = drafter.propose

    def noting(batch: DraftBatch) -> Draft:
        slot = int(batch.slots[0])
        if batch.max_query > 10 and len(found) < 3:
            texts.append(batch.state.text[slot, : int(batch.state.end[slot])].tolist())
            found.append(drafter.guess(batch, 4, 6, 3))
        return propose(batch)

    drafter.propose = noting  # type: ignore[method-assign]
    engine.generate([Request(list(range(40, 71)), Sampling(max_tokens=30, ignore_eos=True))])
    assert len(found) == 3
    for guesses, text in zip(found, texts, strict=True):
        chain = 0
        for depth, level in enumerate(naive_tree(engine, text, 4, 6, 3)):
            assert guesses.tokens[0, depth, : len(level)].tolist() == [token for token, _, _ in level]
            assert guesses.logprobs[0, depth, : len(level)].tolist() == pytest.approx([chance for *_, chance in level])
            assert guesses.logprobs[0, depth, len(level) :].isinf().all()
            if depth:
                assert guesses.parents[0, depth, : len(level)].tolist() == [parent for _, parent, _ in level]
            likeliest: dict[int, int] = {}
            for number, (_, parent, _) in enumerate(level):
                likeliest.setdefault(parent, number)  # a row's first choice is the best of its candidates
            chain = likeliest.get(chain, -1) if 0 <= chain < 3 else -1
            assert int(guesses.chain[0, depth]) == chain


@torch.inference_mode()
def test_a_root_at_place_0_attends_to_itself_alone(tmp_path: Path) -> None:
    engine = engine_with("eagle3", tmp_path)
    drafter, found = engine.drafter, []
    assert isinstance(drafter, Eagle3Drafter)
    propose = drafter.propose

    def noting(batch: DraftBatch) -> Draft:
        if int(batch.state.end[batch.slots[0]]) == 1:
            found.append(drafter.guess(batch, 5, 1).tokens[0, :, 0].tolist())
        return propose(batch)

    drafter.propose = noting  # type: ignore[method-assign]
    for token in (7, 40, 170):
        engine.generate([Request([token], Sampling(max_tokens=2, ignore_eos=True))])
        assert found.pop() == naive_draft(engine, [token], 5)


def test_a_drafter_for_another_target_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "drafter.safetensors"
    tiny_eagle3(path, tiny_config())
    with pytest.raises(ConfigError, match="draft_model"):
        tiny_engine(drafter="eagle3")
    with pytest.raises(BadDrafter, match="states of 32 values"):
        tiny_engine(drafter="eagle3", draft_model=str(path), shape={"hidden_size": 64})
    with pytest.raises(BadDrafter, match="vocabulary"):
        tiny_engine(drafter="eagle3", draft_model=str(path), shape={"vocab_size": 300})
    model = tiny_engine().model

    def settings(**changes: Any) -> ResolvedConfig:
        return replace(tiny_engine().config, drafter="eagle3", draft_model=str(path), **changes)

    tiny_eagle3(path, tiny_config(), target_digest="of other weights", vocabulary_digest="of other tokens")
    model.identity = "of these weights"
    with pytest.raises(BadDrafter, match="other weights"):
        Engine(model, ByteTokenizer(), settings())  # type: ignore[arg-type]
    Engine(model, ByteTokenizer(), settings(force_drafter=True))  # type: ignore[arg-type]
    model.vocabulary = "of these tokens"
    with pytest.raises(BadDrafter, match="another tokenizer"):
        Engine(model, ByteTokenizer(), settings(force_drafter=True))  # type: ignore[arg-type]
