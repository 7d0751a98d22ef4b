"""The training pass of block drafters is what an engine computes at each root."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from paceline.config import EngineConfig, Hardware, resolve
from paceline.drafters.base import DraftBatch
from paceline.drafters.checkpoint import read_checkpoint, write_checkpoint
from paceline.drafters.dflash import DFlashDrafter, DFlashNetwork
from paceline.engine.engine import Engine
from paceline.errors import ConfigError
from paceline.models.decoder import Decoder
from paceline.ops.dispatch import differentiable
from paceline.train import dflash, flash
from paceline.train.capture import Capture, Captured
from paceline.train.dflash import (
    BlockObjective,
    Blocks,
    BlockShape,
    DFlashTrainee,
    dflash_config,
    drafted_entries,
    mask_token,
)
from paceline.train.losses import Acceptance, Objective, compare, summary
from paceline.train.packing import Packing
from paceline.train.run import DRAFTER_FILE, DrafterOptions
from paceline.train.samples import Sample, digest
from paceline.types import Request, Sampling
from tests.drafters.tiny_checkpoints import random_dflash
from tests.tiny import ByteTokenizer, random_tensors, tiny_config
from tests.train.data import random_samples, tiny_run, write

IDS = torch.arange(0, 258, 2)
BLOCK = 5


def target() -> Decoder:
    config = tiny_config(num_layers=6)
    return Decoder(config, random_tensors(config), torch.device("cpu"))


def trainee_of(model: Decoder, **changes: Any) -> DFlashTrainee:
    config = dflash_config(model.config, "", len(IDS), 48, 256, BlockShape(num_drafted=BLOCK, markov_rank=8))
    config = config.__class__(**{**vars(config), **changes})
    return DFlashTrainee(config, model.embedding, model.head_rows(IDS))


def captured(model: Decoder, trainee: DFlashTrainee, samples: list[Sample]) -> Captured:
    packing = Packing(samples, 64, 0, ["code"])
    return Capture(model, trainee.config.features, IDS)(packing.pack(packing.epoch(0)))


def every_block(batch: Captured, num_rows: int) -> Blocks:
    """All drafts that training may choose."""
    entries = (batch.follows & (batch.weights > 0)).nonzero()[:, 0]
    return Blocks(entries, batch.places[entries], torch.ones(len(entries)), num_rows)


def engine_of(model: Decoder, path: Path, **settings: Any) -> Engine:
    values = {"device": "cpu", "dtype": "float32", "max_context": 256, "cache_tokens": 1024, "threads": 1, **settings}
    resolved = resolve(
        EngineConfig(drafter="dflash", draft_model=str(path), **values), Hardware(False, 1, 1 << 30), 4096
    )
    return Engine(model, ByteTokenizer(), resolved)  # type: ignore[arg-type]


@pytest.mark.parametrize("sample_from_anchor", [True, False])
@pytest.mark.parametrize("length", [BLOCK - 1, 2])
def test_logits_are_those_of_the_engine(
    sample_from_anchor: bool, length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole blocks and shorter ones, over texts that the engine has written, several in a packed row."""
    model, path = target(), tmp_path / "drafter.safetensors"
    trainee = trainee_of(model, sample_from_anchor=sample_from_anchor)
    tensors = random_dflash(trainee.config)
    write_checkpoint(path, trainee.config, tensors, IDS)
    engine = engine_of(model, path, fixed_draft=length)
    drafter = engine.drafter
    assert isinstance(drafter, DFlashDrafter)
    seen: dict[tuple[int, ...], Tensor] = {}
    block = drafter._block

    def noting(batch: DraftBatch, count: int, width: int, beams: int = 1) -> object:
        result = block(batch, count, width, beams)
        for index, slot in enumerate(batch.slots.tolist()):
            text = batch.state.text[slot, : int(batch.state.end[slot])].tolist()
            seen[tuple(text)] = drafter.network.logits(result.hidden.view(count, len(batch.slots), -1)[:, index])
        return result

    monkeypatch.setattr(drafter, "_block", noting)
    samples, texts = [], []
    for prompt in ([7, 9], list(range(40, 55)), [3] * 6):
        [completion] = engine.generate([Request(prompt, Sampling(max_tokens=14, ignore_eos=True))])
        text = [*prompt, *completion.tokens]
        texts.append(text)
        tokens = np.array(text, np.uint32)
        samples.append(Sample(digest(bytes(str(prompt), "ascii")), "code", tokens, ((len(prompt), len(text)),)))
    batch = captured(model, trainee, samples)
    blocks = every_block(batch, length + (not sample_from_anchor))
    compared = 0
    with torch.no_grad(), differentiable():
        network = DFlashNetwork(trainee.config, tensors, model.head_rows(IDS), training=True)
        hidden = trainee.hidden(network, batch, blocks)
        logits = trainee.logits(network, batch, blocks, hidden)
    flat = batch.tokens.flatten()
    for anchor, mine, rows in zip(blocks.anchors.tolist(), logits, hidden, strict=True):
        text = flat[anchor - int(batch.positions.flatten()[anchor]) : anchor + 1].tolist()
        before = flat[anchor : anchor + length]
        assert mine.shape == (length, len(IDS))
        torch.testing.assert_close(mine - network.markov(before), network.logits(rows), atol=1e-4, rtol=1e-4)
        if tuple(text) in seen:
            torch.testing.assert_close(network.logits(rows), seen[tuple(text)], atol=3e-5, rtol=1e-5)
            compared += 1
    assert compared > 10


def test_the_loss_is_its_formula() -> None:
    """Over all drafts of a batch, a token at a time: which are supervised, by which distribution, with which weights."""
    model = target()
    trainee = trainee_of(model)
    batch = captured(model, trainee, random_samples(7, length=30))
    tensors = random_dflash(trainee.config)
    possible = batch.follows & (batch.weights > 0)
    trainee.objective = BlockObjective(share=1.0)
    acceptance = Acceptance(1, BLOCK, torch.device("cpu"))
    with torch.no_grad(), differentiable():
        loss = trainee.loss(tensors, batch, acceptance)
        network = DFlashNetwork(trainee.config, tensors, model.head_rows(IDS), training=True)
        blocks = every_block(batch, BLOCK)
        hidden = trainee.hidden(network, batch, blocks)
        logits = trainee.logits(network, batch, blocks, hidden)
    place_of = {int(place): n for n, place in enumerate(batch.places) if batch.weights[n]}
    weights = torch.exp(-torch.arange(BLOCK) / (0.5 * (BLOCK + 1)))
    weights = weights / weights.sum()
    documents, tokens = batch.documents.flatten(), batch.tokens.flatten()
    terms, accepted, begun = [], np.zeros(BLOCK), np.zeros(BLOCK)
    for row, anchor in enumerate(blocks.anchors.tolist()):
        alive = True
        for j in range(BLOCK):
            n = place_of.get(anchor + j)
            if n is None or documents[anchor + j] != documents[anchor]:
                break
            result = compare(
                logits[row, j][None], batch.logits[n][None], batch.normaliser[n][None], batch.choice[n][None]
            )
            probability = network.confidence(hidden[row, j][None], tokens[anchor + j][None]).sigmoid()
            rate = 1 - result.refused
            entropy = -(rate * probability.log() + (1 - rate) * (1 - probability).log())
            terms.append([float(each) for each in (weights[j], result.kl, result.refused, entropy)])
            begun[j] += alive
            alive = alive and bool(result.matches)
            accepted[j] += alive
            alive = alive and int(IDS[batch.choice[n]]) == int(tokens[anchor + j + 1])
    weight, kl, refused, entropy = np.array(terms).T
    share = 0.1 + 0.9 * np.exp(-3 * (weight * (1 - refused)).sum() / weight.sum())
    total = (weight * (share * kl + (1 - share) * refused + entropy)).sum()
    expected = total / len(blocks.anchors) * float(batch.weights.sum())
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    counts = acceptance.counts[0]
    assert int(possible.sum()) == len(blocks.anchors) == counts[0, 0]
    assert counts[:, 3].tolist() == begun.tolist() and counts[:, 4].tolist() == accepted.tolist()
    assert 1 <= float(summary(counts)["length"]) <= 1 + BLOCK  # type: ignore[arg-type]


def test_gradients_reach_every_tensor_and_training_lowers_the_loss() -> None:
    torch.manual_seed(0)
    model = target()
    trainee = trainee_of(model)
    batch = captured(model, trainee, random_samples(7, length=30))
    tensors = {name: tensor.requires_grad_() for name, tensor in trainee.initial(0).items()}
    optimizer = torch.optim.AdamW(tensors.values(), lr=3e-3)

    def evaluated() -> tuple[float, float]:
        acceptance = Acceptance(1, BLOCK, torch.device("cpu"))
        with torch.no_grad():
            loss = float(trainee.loss(tensors, batch, acceptance))
        return loss, float(summary(acceptance.counts[0])["length"])  # type: ignore[arg-type]

    before = evaluated()
    assert evaluated() == before, "an evaluation has the same drafts each time"
    for _ in range(60):
        optimizer.zero_grad()
        trainee.loss(tensors, batch, Acceptance(1, BLOCK, torch.device("cpu"))).backward()
        optimizer.step()
    assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in tensors.values())
    after = evaluated()
    assert after[0] < 0.85 * before[0] and after[1] > before[1] + 0.5, (before, after)


def test_shorter_blocks_and_anchors_are_drawn() -> None:
    torch.manual_seed(0)
    model = target()
    for sample_from_anchor in (True, False):
        trainee = trainee_of(model, sample_from_anchor=sample_from_anchor)
        batch = captured(model, trainee, random_samples(7, length=30))
        drawn = [trainee.choose(batch) for _ in range(200)]
        lengths = {each.num_rows for each in drawn}
        assert lengths == set(range(1 if sample_from_anchor else 2, BLOCK + 1))
        for blocks in drawn[:20]:
            kept = blocks.weights > 0
            assert (
                len(blocks.entries) == -(-len(batch.places) // 2)
                and len(set(blocks.anchors[kept].tolist())) == kept.sum()
            )
            assert bool((batch.follows[blocks.entries[kept]] & (batch.weights[blocks.entries[kept]] > 0)).all())
            _, inside = drafted_entries(batch, blocks, BLOCK)
            assert not bool(inside[~kept].any())


def flash_forward(query: Tensor, keys: Tensor, values: Tensor, documents: flash.Documents) -> Any:
    scores, group = _scores(query, keys, documents.starts), query.shape[1] // keys.shape[1]
    out = torch.einsum("hts,shd->thd", scores.softmax(-1), values.repeat_interleave(group, 1))
    return out, scores.logsumexp(-1), ()


def flash_backward(
    grad: Tensor, inputs: tuple[Tensor, ...], out: Tensor, log_sum: Tensor, documents: flash.Documents, state: Any
) -> Any:
    query, keys, values = inputs
    group, scale = query.shape[1] // keys.shape[1], flash.scale_of(query)
    shares = (_scores(query, keys, documents.starts) - log_sum[..., None]).exp()
    upstream = torch.einsum("thd,shd->hts", grad, values.repeat_interleave(group, 1))
    of_scores = shares * (upstream - (grad * out).sum(-1).T[..., None]) * scale
    of_query = torch.einsum("hts,shd->thd", of_scores, keys.repeat_interleave(group, 1))
    of_keys = torch.einsum("hts,thd->shd", of_scores, query).unflatten(1, (-1, group)).sum(2)
    of_values = torch.einsum("hts,thd->shd", shares, grad).unflatten(1, (-1, group)).sum(2)
    return of_query, of_keys, of_values


def _scores(query: Tensor, keys: Tensor, starts: Tensor) -> Tensor:
    place = torch.arange(len(query))
    document = torch.searchsorted(starts, place, right=True)
    visible = (document[:, None] == document) & (place <= place[:, None])
    scores = torch.einsum("thd,shd->hts", query, keys.repeat_interleave(query.shape[1] // keys.shape[1], 1))
    return (scores * flash.scale_of(query)).masked_fill(~visible, -torch.inf)


def test_flash_attention_gives_the_same_states_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU flash attention is replaced by its definition."""
    monkeypatch.setattr(flash, "flash_forward", flash_forward)
    monkeypatch.setattr(flash, "flash_backward", flash_backward)
    model = target()
    trainee = trainee_of(model)
    batch = captured(model, trainee, random_samples(7, length=30))
    blocks = every_block(batch, BLOCK)
    found = []
    for attend in (dflash.dense_attend, dflash.flash_attend):
        monkeypatch.setattr(dflash, "dense_attend", attend)
        tensors = {name: each.requires_grad_() for name, each in random_dflash(trainee.config).items()}
        with differentiable():
            network = DFlashNetwork(trainee.config, tensors, model.head_rows(IDS), training=True)
            hidden = trainee.hidden(network, batch, blocks)
            (hidden * torch.linspace(-1, 1, hidden.numel()).view(hidden.shape)).sum().backward()
        found.append((hidden, {name: each.grad for name, each in tensors.items() if each.grad is not None}))
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-5, rtol=1e-5)
    assert len(found[0][1]) > 20
    for name, expected in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], expected, atol=1e-3, rtol=1e-4)


def test_the_shortest_block_is_drawn() -> None:
    torch.manual_seed(0)
    model = target()
    trainee = trainee_of(model, block_size=2, sample_from_anchor=False)
    batch = captured(model, trainee, random_samples(7, length=30))
    assert {trainee.choose(batch).num_rows for _ in range(30)} == {2}


def test_a_mask_token_is_unseen_and_usual() -> None:
    table = torch.eye(6) * torch.tensor([1.0, 0.0, 1.2, 5.0, 0.9, 1.0])

    def sample(*tokens: int) -> Sample:
        return Sample(digest(bytes(tokens)), "code", np.array(tokens, np.uint32), ((1, len(tokens)),))

    assert mask_token(table, [sample(0, 3), sample(5, 3, 3)]) == 4
    assert mask_token(table, [sample(0, 5, 4)]) == 2
    assert mask_token(table, [sample(0, 5), sample(2, 4)]) == 1


@pytest.mark.parametrize("markov_rank", [8, 0])
def test_a_run_trains_a_drafter_that_the_engine_loads_and_continues(markov_rank: int, tmp_path: Path) -> None:
    options = DrafterOptions("dflash", 64, 48, steps=4, layers=1, markov_rank=markov_rank)
    file = write(tmp_path / "samples.bin", random_samples(30))
    for tokens in (3000, 5000):
        run = tiny_run(tmp_path, options=options, tokens=tokens)
        card = run.train([file])
    assert card["kind"] == "dflash" and card["tokens"] >= 5000 and len(card["evaluation"]["acceptance"]) == 4
    config = read_checkpoint(tmp_path / DRAFTER_FILE).config
    assert config.num_drafted == 4 and config.confidence_head == config.sample_from_anchor == (markov_rank > 0)
    engine = engine_of(run.target.model, tmp_path / DRAFTER_FILE, fixed_draft=4)
    prompts = [each.tokens[:20].tolist() for each in random_samples(3)]
    requests = [Request(each, Sampling(max_tokens=20, ignore_eos=True)) for each in prompts]
    plain = engine_of(run.target.model, tmp_path / DRAFTER_FILE, fixed_draft=0)
    assert [each.tokens for each in engine.generate(requests)] == [each.tokens for each in plain.generate(requests)]
    with pytest.raises(ConfigError, match="trains another drafter"):
        tiny_run(tmp_path, options=dataclasses.replace(options, steps=5), tokens=9000).train([file])
    with pytest.raises(ConfigError, match="loss of its own"):
        tiny_run(tmp_path, options=options, tokens=9000, objective=Objective("tv")).train([file])


def test_values_that_nothing_can_be_learnt_with_are_refused() -> None:
    for values in ({"reach": 0.0}, {"share": 0.0}, {"cross_entropy": 1.5}):
        with pytest.raises(ConfigError, match="block's losses"):
            BlockObjective(**values)
