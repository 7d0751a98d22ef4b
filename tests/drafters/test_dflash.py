"""The block drafter: its drafts are those of the network's formulas over the whole text, whatever the cache holds."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from paceline.drafters.base import DraftBatch
from paceline.drafters.checkpoint import read_checkpoint, write_checkpoint
from paceline.drafters.config import DraftConfig
from paceline.drafters.dflash import DFlashDrafter, DFlashNetwork
from paceline.engine.engine import Engine
from paceline.engine.sequence import Sequence
from paceline.errors import BadDrafter
from paceline.models.rope import rope_table
from paceline.ops.draft import Draft
from paceline.ops.linear import rms_norm
from paceline.ops.rope import rotate
from paceline.types import Request, Sampling
from tests.drafters.test_eagle3 import drafts_of, hidden_states
from tests.drafters.tiny_checkpoints import dflash_config, engine_with, random_dflash, settings_for, tiny_dflash
from tests.tiny import tiny_config, tiny_engine

VARIANTS: list[dict[str, Any]] = [
    {},
    {"sample_from_anchor": False},
    {"markov_rank": 0, "confidence_head": False, "block_size": 2, "sample_from_anchor": False},
    {"markov_rank": 0, "block_size": 40},
]


def naive_block(
    config: DraftConfig,
    tensors: Mapping[str, Tensor],
    embedding: Tensor,
    head: Tensor,
    features: Tensor,
    root: int,
    rows: int,
) -> Tensor:
    """The final hidden states [rows, H] of a block after a context with these features [C, F * H], dense.

    DFlash, section 4: keys and values of a layer are projections of the fused features and of the block side by side.
    """
    layer, eps = config.layer, config.layer.rms_norm_eps
    dim, group = layer.head_dim, layer.num_heads // layer.num_kv_heads
    context = rms_norm(features @ tensors["fc.weight"].T, tensors["hidden_norm.weight"], eps)
    hidden = embedding[torch.tensor([root] + [config.mask_token] * (rows - 1))]
    cosines, sines = rope_table(layer, 600)[: len(context) + rows, None].chunk(2, dim=-1)
    for index in range(layer.num_layers):

        def weight(name: str, index: int = index) -> Tensor:
            return tensors[f"layers.{index}.{name}.weight"]

        inputs = rms_norm(hidden, weight("input_layernorm"), eps)
        both = torch.cat([context, inputs])
        query = (inputs @ weight("self_attn.q_proj").T).view(rows, -1, dim)
        key = (both @ weight("self_attn.k_proj").T).view(len(both), -1, dim)
        value = (both @ weight("self_attn.v_proj").T).view(len(both), -1, dim)
        if layer.qk_norm:
            query, key = (
                rms_norm(query, weight("self_attn.q_norm"), eps),
                rms_norm(key, weight("self_attn.k_norm"), eps),
            )
        query, key = rotate(query, cosines[-rows:], sines[-rows:]), rotate(key, cosines, sines)
        scores = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(group, 1)) / dim**0.5
        attended = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value.repeat_interleave(group, 1)).flatten(1)
        hidden = hidden + attended @ weight("self_attn.o_proj").T
        inputs = rms_norm(hidden, weight("post_attention_layernorm"), eps)
        gated = F.silu(inputs @ weight("mlp.gate_proj").T) * (inputs @ weight("mlp.up_proj").T)
        hidden = hidden + gated @ weight("mlp.down_proj").T
    return rms_norm(hidden, tensors["norm.weight"], eps)


def naive_draft(engine: Engine, text: list[int], length: int) -> tuple[list[int], list[float]]:
    """The draft after `text`, and the chance of each token, from the target's states of all but its last token."""
    drafter = engine.drafter
    assert isinstance(drafter, DFlashDrafter) and engine.config.draft_model is not None
    checkpoint = read_checkpoint(Path(engine.config.draft_model))
    config, tensors = checkpoint.config, checkpoint.tensors
    head = engine.model.head_rows(checkpoint.draft_tokens)
    skipped = int(not config.sample_from_anchor)
    features = torch.zeros(0, tensors["fc.weight"].shape[1])
    if len(text) > 1:
        features = hidden_states(engine, text[:-1])
    hidden = naive_block(config, tensors, engine.model.embedding, head, features, text[-1], length + skipped)
    tokens, confidence, before = [], [], text[-1]
    for row in hidden[skipped:]:
        logits = row @ head.T
        inputs = row
        if config.markov_rank:
            embedded = tensors["markov_head.markov_w1.weight"][before]
            logits = logits + tensors["markov_head.markov_w2.weight"] @ embedded
            inputs = torch.cat([row, embedded])
        if config.confidence_head:
            logit = tensors["confidence_head.proj.weight"][0] @ inputs + tensors["confidence_head.proj.bias"][0]
            confidence.append(float(logit.sigmoid()))
        else:
            confidence.append(float(logits.softmax(-1).max()))
        before = int(logits.argmax())
        if checkpoint.draft_tokens is not None:
            before = int(checkpoint.draft_tokens[before])
        tokens.append(before)
    return tokens, confidence


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda each: "-".join(each) or "plain")
@pytest.mark.parametrize("qk_norm", [True, False])
@torch.inference_mode()
def test_a_block_is_that_of_the_formulas(variant: dict[str, Any], qk_norm: bool, tmp_path: Path) -> None:
    """Requests side by side, prompts in chunks, drafts of every length, which differ within a step."""
    target, path, draw = tiny_config(), tmp_path / "drafter.safetensors", random.Random(3)
    layer = dflash_config(target).layer.__class__(**{**vars(dflash_config(target).layer), "qk_norm": qk_norm})
    tiny_dflash(path, target, layer=layer, **variant)
    engine = tiny_engine(drafter="dflash", draft_model=str(path), prefill_chunk=7, page_size=4)
    drafter = engine.drafter
    assert isinstance(drafter, DFlashDrafter)
    longest = drafter.draft_config.num_drafted
    assert drafter.lengths[0] == 0 and drafter.lengths[-1] == longest

    def lengths(sequences: list[Sequence]) -> list[int]:
        return [draw.choice([0, 1, 2, longest, longest]) for _ in sequences]

    found: list[tuple[list[int], list[int], list[float]]] = []
    propose = drafter.propose

    def noting(batch: DraftBatch) -> Draft:
        draft = propose(batch)
        guesses = drafter.guess(batch, batch.max_query - 1, 1) if batch.max_query > 1 else None
        bounds = batch.query_starts.tolist()
        for index, (slot, first, last) in enumerate(zip(batch.slots.tolist(), bounds, bounds[1:], strict=False)):
            text = batch.state.text[slot, int(batch.state.history_start[slot]) : int(batch.state.end[slot])].tolist()
            chances: list[float] = []
            if guesses is not None:
                assert draft.tokens[first + 1 : last].tolist() == guesses.tokens[index, : last - first - 1, 0].tolist()
                chances = guesses.logprobs[index, : last - first - 1, 0].exp().tolist()
            found.append((text, draft.tokens[first + 1 : last].tolist(), chances))
        return draft

    engine.scheduler.draft_lengths = lengths
    drafter.propose = noting  # type: ignore[method-assign]
    prompts = [[7], list(range(40, 80)), [3] * 16, list(range(17)) * 3]
    engine.generate([Request(each, Sampling(max_tokens=9, ignore_eos=True)) for each in prompts])
    assert {len(tokens) for _, tokens, _ in found} >= {0, 1, longest}
    for text, tokens, chances in found:
        expected, probabilities = naive_draft(engine, text, len(tokens)) if tokens else ([], [])
        assert tokens == expected
        assert chances == pytest.approx(probabilities, abs=1e-5)


def test_candidates_share_what_the_confidence_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first candidate's probability is the confidence head's; the others keep their proportions."""
    engine = engine_with("dflash", tmp_path, fixed_draft=6)
    drafter = engine.drafter
    assert isinstance(drafter, DFlashDrafter)
    seen = []
    propose = drafter.propose

    def noting(batch: DraftBatch) -> Draft:
        if batch.max_query > 1:
            seen.append((drafter.guess(batch, 4, 3), drafter._block(batch, 4, 3)))
        return propose(batch)

    monkeypatch.setattr(drafter, "propose", noting)
    engine.generate([Request([1, 2, 3, 4], Sampling(max_tokens=12, ignore_eos=True))] * 2)
    for guesses, block in seen:
        assert guesses.tokens.shape == guesses.logprobs.shape == (guesses.tokens.shape[0], 4, 3)
        assert torch.equal(guesses.tokens, block.guesses.tokens)
        chances, own = guesses.logprobs.exp(), block.guesses.logprobs.exp()
        before = torch.cat([block.roots[:, None], guesses.tokens[:, :-1, 0]], dim=1).T.flatten()
        first = drafter.network.confidence(block.hidden, before).sigmoid().view(4, -1).T
        torch.testing.assert_close(chances[..., 0], first)
        torch.testing.assert_close(chances[..., 1:], (1 - first)[..., None] * own[..., 1:] / (1 - own[..., :1]))
    assert seen


def test_more_tokens_than_a_block_has_are_padding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request([1, 2, 3, 4], Sampling(max_tokens=12, ignore_eos=True))
    drafts = [
        drafts_of(engine_with("dflash", tmp_path, fixed_draft=count), request, monkeypatch)[1] for count in (6, 9)
    ]
    assert drafts[1] == drafts[0] + [0, 0, 0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_whole_vocabulary_and_own_head_and_embedding(dtype: str, tmp_path: Path) -> None:
    target = tiny_config(hidden_size=64, head_dim=32)
    config = dflash_config(target, draft_vocab_size=target.vocab_size)
    path = tmp_path / "drafter.safetensors"
    tensors = random_dflash(config)
    model = tiny_engine(shape={"hidden_size": 64, "head_dim": 32}).model
    request = Request(list(range(30)), Sampling(max_tokens=20, ignore_eos=True))
    outputs = []
    for own in ({}, {"lm_head.weight": model.head_rows(None), "embed_tokens.weight": model.embedding.clone()}):
        write_checkpoint(path, config, {**tensors, **own}, None)
        engine = tiny_engine(
            drafter="dflash",
            draft_model=str(path),
            dtype=dtype,
            fixed_draft=6,
            shape={"hidden_size": 64, "head_dim": 32},
        )
        outputs.append(engine.generate([request])[0])
    assert outputs[0].tokens == outputs[1].tokens
    assert outputs[0].usage.accepted_tokens == outputs[1].usage.accepted_tokens


def test_norms_that_the_network_does_not_have_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "drafter.safetensors"
    tiny_dflash(path, tiny_config(), norm_before_fc=True)
    with pytest.raises(BadDrafter, match="norms before fc"):
        tiny_engine(drafter="dflash", draft_model=str(path))


def test_the_settings_of_another_kind_are_refused(tmp_path: Path) -> None:
    settings = settings_for("eagle3", tmp_path, tiny_config())
    with pytest.raises(BadDrafter, match="of kind eagle3, not dflash"):
        tiny_engine(drafter="dflash", draft_model=settings["draft_model"])


def test_training_weights_are_views() -> None:
    config = dflash_config(tiny_config(), confidence_head=False)
    tensors = {name: each.requires_grad_() for name, each in random_dflash(config).items()}
    network = DFlashNetwork(config, tensors, torch.randn(config.draft_vocab_size, 32), training=True)
    network.logits(network.context(torch.randn(3, 64))).sum().backward()
    assert tensors["fc.weight"].grad is not None
