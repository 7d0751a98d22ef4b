"""The block drafter: its drafts are those of the network's formulas over the whole text, whatever the cache holds."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from paceline.drafters.base import DraftBatch
from paceline.drafters.checkpoint import DraftCheckpoint, read_checkpoint, write_checkpoint
from paceline.drafters.config import DraftConfig
from paceline.drafters.dflash import DFlashDrafter, DFlashNetwork
from paceline.drafters.joint import JointDrafter
from paceline.drafters.trees import Shape
from paceline.engine.engine import Engine
from paceline.engine.sequence import Sequence
from paceline.errors import BadDrafter
from paceline.models.rope import rope_table
from paceline.ops.chain_layout import BlockLayout
from paceline.ops.choose import put_first
from paceline.ops.draft import Draft
from paceline.ops.draw import Draws, draw
from paceline.ops.join_drafts import Guesses
from paceline.ops.linear import rms_norm
from paceline.ops.rope import rotate
from paceline.types import Request, Sampling
from tests.drafters.test_eagle3 import drafts_of, hidden_states
from tests.drafters.tiny_checkpoints import dflash_config, engine_with, random_dflash, settings_for, tiny_dflash
from tests.engine.test_engine import copying_request, everything_is_back, mutated, plain
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


def naive_hidden(engine: Engine, text: list[int], length: int) -> tuple[DraftCheckpoint, Tensor, Tensor]:
    """The drafter, and the final hidden states [length, H] and the head that the tokens after `text` are drafted from.

    The states follow from the target's of all tokens but the last.
    """
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
    return checkpoint, hidden[skipped:], head


def naive_draft(engine: Engine, text: list[int], length: int) -> tuple[list[int], list[float]]:
    """The draft after `text`, and the chance of each token."""
    checkpoint, hidden, head = naive_hidden(engine, text, length)
    config, tensors = checkpoint.config, checkpoint.tensors
    tokens, confidence, before = [], [], text[-1]
    for row in hidden:
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
    """Requests side by side, prompts in chunks, drafts of every length, which differ within a step; chains alone."""
    target, path, draw = tiny_config(), tmp_path / "drafter.safetensors", random.Random(3)
    layer = dflash_config(target).layer.__class__(**{**vars(dflash_config(target).layer), "qk_norm": qk_norm})
    tiny_dflash(path, target, layer=layer, **variant)
    engine = tiny_engine(drafter="dflash", draft_model=str(path), prefill_chunk=7, page_size=4, deterministic=True)
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


Level = list[tuple[int, int, float, int]]


def naive_tree(engine: Engine, text: list[int], draws: Draws, shape: Shape) -> list[tuple[Level, int]]:
    """By depth: (token, candidate that it follows, log-probability, rank) of the best, and the first choice's place.

    `draws` is of one slot, that of the request.
    """
    checkpoint, hidden, head = naive_hidden(engine, text, shape.depth)
    tensors, columns = checkpoint.tensors, checkpoint.draft_tokens
    assert columns is not None
    paths, levels, chain = [(0.0, text[-1])], [], 0
    for depth, row in enumerate(hidden):
        found = []
        for number, (score, before) in enumerate(paths[: shape.beams]):
            logits = row @ head.T
            if checkpoint.config.markov_rank:
                logits = (
                    logits + tensors["markov_head.markov_w2.weight"] @ tensors["markov_head.markov_w1.weight"][before]
                )
            chances, order = logits.log_softmax(-1).topk(4)
            drawn = draw(logits[None], order[:1], torch.tensor([0]), torch.tensor([len(text) + depth]), draws, columns)
            tokens = columns[put_first(order[None], drawn)[0]].tolist()
            for rank, (token, chance) in enumerate(zip(tokens, chances.tolist(), strict=True)):
                found.append((score + chance, token, number, chance, rank))
        found.sort(key=lambda each: -each[0])
        found = found[: shape.width]
        first = [place for place, each in enumerate(found) if each[2] == chain and each[4] == 0]
        chain = first[0] if first and chain < shape.beams else -1
        levels.append(([each[1:] for each in found], chain))
        paths = [each[:2] for each in found]
    return levels


@pytest.mark.parametrize("variant", VARIANTS[:3], ids=lambda each: "-".join(each) or "plain")
@pytest.mark.parametrize("temperature", [0.0, 0.9])
@torch.inference_mode()
def test_a_tree_is_a_beam_search_over_logits_and_bias(
    variant: dict[str, Any], temperature: float, tmp_path: Path
) -> None:
    """Of requests side by side, with as many tokens to draft as each has, which differ within a step."""
    path, choice = tmp_path / "drafter.safetensors", random.Random(4)
    tiny_dflash(path, tiny_config(), **variant)
    engine = tiny_engine(drafter="dflash", draft_model=str(path), page_size=4)
    drafter = engine.drafter
    assert isinstance(drafter, DFlashDrafter)
    longest = drafter.draft_config.num_drafted
    found: list[tuple[list[int], Draws, Shape, Guesses]] = []
    propose = drafter.propose

    def noting(batch: DraftBatch) -> Draft:
        if batch.max_query > 1 and len(found) < 40:
            shape = Shape(batch.max_query - 1, *choice.choice([(4, 2), (6, 3), (8, 4), (5, 4)]))
            guesses = drafter.guess(batch, *shape)
            lengths = (batch.query_starts.diff() - 1).tolist()
            for row, (slot, length) in enumerate(zip(batch.slots.tolist(), lengths, strict=True)):
                text = batch.state.text[
                    slot, int(batch.state.history_start[slot]) : int(batch.state.end[slot])
                ].tolist()
                draws = Draws(batch.draws.seeds[slot, None].clone(), batch.draws.filters[slot, None].clone())
                assert guesses.parents is not None and guesses.chain is not None
                every = (guesses.tokens, guesses.logprobs, guesses.parents, guesses.chain)
                own = Guesses(*(each[row, :length].clone() for each in every))
                found.append((text, draws, shape._replace(depth=min(length, longest)), own))
        return propose(batch)

    drafter.propose = noting  # type: ignore[method-assign]
    engine.scheduler.draft_lengths = lambda sequences: [choice.choice([1, 2, longest, longest]) for _ in sequences]
    sampling = [Sampling(max_tokens=9, ignore_eos=True, temperature=temperature, seed=each) for each in range(3)]
    prompts = [[7], list(range(40, 80)), list(range(17)) * 3]
    engine.generate([Request(*each) for each in zip(prompts, sampling, strict=True)])
    assert len(found) >= 12 and {shape.depth for _, _, shape, _ in found} >= {1, longest}
    for text, draws, shape, guesses in found:
        assert guesses.parents is not None and guesses.chain is not None
        levels = naive_tree(engine, text, draws, shape) if shape.depth else []
        for depth, (level, chain) in enumerate(levels):
            count = len(level)
            assert guesses.tokens[depth, :count].tolist() == [token for token, *_ in level]
            assert guesses.logprobs[depth, :count].tolist() == pytest.approx([each[2] for each in level], abs=1e-5)
            assert guesses.logprobs[depth, count:].isinf().all()
            if depth:
                assert guesses.parents[depth, :count].tolist() == [each[1] for each in level]
            assert int(guesses.chain[depth]) == chain


@pytest.mark.parametrize("length", [7, 11, 15, 23, 31, None])
@pytest.mark.parametrize("block_size", [3, 12])
def test_joint_trees_give_the_output_of_plain_decoding(length: int | None, block_size: int, tmp_path: Path) -> None:
    """Greedy and drawn requests; some copy. Without a fixed length the requests of a step have different ones."""
    path, choice = tmp_path / "drafter.safetensors", random.Random(6)
    tiny_dflash(path, tiny_config(), block_size=block_size)
    requests = [copying_request(choice, temperature=0.8 * (index % 2), seed=index) for index in range(9)]
    expected = plain(tiny_engine(drafter="none", max_batch=1), requests)
    requests = [
        replace(each, sources=(mutated(choice, tokens),)) if index % 3 else each
        for index, (each, tokens) in enumerate(zip(requests, expected, strict=True))
    ]
    engine = tiny_engine(drafter="joint", draft_model=str(path), fixed_draft=length, max_batch=4, page_size=4)
    assert isinstance(engine.drafter, JointDrafter)
    assert engine.drafter.trees.shapes[31] == Shape(min(12, block_size), 8, 4)
    if length is None:
        lengths = list(engine.drafter.trees.shapes)
        engine.scheduler.draft_lengths = lambda sequences: [choice.choice(lengths) for _ in sequences]
    for _ in range(2):  # the second time from the prefix cache
        completions = engine.generate(requests)
        assert [each.tokens for each in completions] == expected
        assert sum(each.usage.accepted_tokens for each in completions) > 0
    everything_is_back(engine)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_tree_goes_on_after_a_second_candidate(
    temperature: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits whose likeliest token is wrong at every third place, and the second one right."""
    path = tmp_path / "drafter.safetensors"
    target = tiny_config()
    tiny_dflash(path, target, block_size=12, draft_vocab_size=target.vocab_size, markov_rank=0, confidence_head=False)
    prompts = [[5, 6, 7, 8], list(range(40, 61)), [9] * 16]
    sampling = [Sampling(max_tokens=40, ignore_eos=True, temperature=temperature, seed=each) for each in range(3)]
    requests = [Request(*each) for each in zip(prompts, sampling, strict=True)]
    outputs = [each.tokens for each in tiny_engine(drafter="none").generate(requests)]
    engine = tiny_engine(drafter="joint", draft_model=str(path), fixed_draft=23, max_batch=3)
    assert isinstance(engine.drafter, JointDrafter)
    drafter = engine.drafter.trained
    assert isinstance(drafter, DFlashDrafter)
    tree, texts = drafter._tree, [prompt + output for prompt, output in zip(prompts, outputs, strict=True)]

    def knowing(batch: DraftBatch, layout: BlockLayout, every: Tensor, width: int, beams: int) -> Guesses:
        logits = torch.zeros_like(every)
        for row, slot in enumerate(batch.slots.tolist()):
            own = batch.state.text[slot, int(batch.state.history_start[slot]) : int(batch.state.end[slot])].tolist()
            whole = next(text for text in texts if text[: len(own)] == own)
            for depth, token in enumerate(whole[len(own) : len(own) + len(every)]):
                misses = (len(own) + depth) % 3 == 0
                logits[depth, row, token] = 40.0
                logits[depth, row, (token + 1) % target.vocab_size] = 40.4 if misses else 38.0
        return tree(batch, layout, logits, width, beams)

    monkeypatch.setattr(drafter, "_tree", knowing)
    completions = engine.generate(requests)
    assert [each.tokens for each in completions] == outputs
    for each in completions:
        assert each.usage.accepted_tokens / each.usage.steps > 5


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
        drafts_of(engine_with("dflash", tmp_path, fixed_draft=count, deterministic=True), request, monkeypatch)[1]
        for count in (6, 9)
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
