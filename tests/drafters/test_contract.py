"""The contract of every drafter, over all rows of `config.DRAFTERS` and the two example drafters of this folder.

A new drafter needs its row there, and nothing here.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from paceline.config import DRAFTERS, MAX_DRAFT
from paceline.drafters.base import DraftBatch
from paceline.engine.engine import Engine
from paceline.engine.grammar import regex
from paceline.errors import ConfigError
from paceline.kv.cache import KVCache
from paceline.models.decoder import Decoder
from paceline.ops.attention import AttentionBatch
from paceline.ops.draft import DRAFTED, FROM_MODEL, FROM_SOURCE, Draft
from paceline.ops.draw import draw as draw_op
from paceline.types import Request, Sampling
from tests.drafters.tiny_checkpoints import engine_with, settings_for
from tests.engine.test_engine import copying_request, everything_is_back, mutated, plain
from tests.tiny import ByteTokenizer, random_tensors, tiny_config, tiny_engine

EXAMPLES = {"ngram": "tests.drafters.ngram:NgramDrafter", "tree": "tests.drafters.tree:TreeDrafter"}
NAMES = [*DRAFTERS, *EXAMPLES]
Observed = list[tuple[DraftBatch, Draft]]


@pytest.fixture(autouse=True)
def rows(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, target in EXAMPLES.items():
        monkeypatch.setitem(DRAFTERS, name, target)


@pytest.fixture
def observed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Engine], Observed]]:
    """Collects what an engine's drafter proposes."""

    def observe(engine: Engine) -> Observed:
        found: Observed = []
        propose = engine.drafter.propose

        def noting(batch: DraftBatch) -> Draft:
            draft = propose(batch)
            found.append((batch, draft))
            return draft

        monkeypatch.setattr(engine.drafter, "propose", noting)
        return found

    yield observe


def variety(draw: random.Random, count: int) -> list[Request]:
    """Greedy, drawn and penalised requests, with what one may report."""
    samplings: tuple[dict[str, Any], ...] = (
        {},
        {"temperature": 0.8, "top_p": 0.9},
        {"frequency_penalty": 0.6, "repetition_penalty": 1.1},
        {"logprobs": 2, "logit_bias": {3: 1.5}},
    )
    return [copying_request(draw, seed=index, **samplings[index % 4]) for index in range(count)]


@pytest.mark.parametrize("name", NAMES)
def test_the_output_is_that_of_plain_decoding(name: str, tmp_path: Path) -> None:
    draw = random.Random(5)
    requests = variety(draw, 12)
    expected = plain(tiny_engine(drafter="none", prefix_cache=False, max_batch=1), requests)
    requests = [
        replace(each, sources=(mutated(draw, tokens),)) if index % 3 else each
        for index, (each, tokens) in enumerate(zip(requests, expected, strict=True))
    ]
    accepted = 0
    for settings in (
        {},
        {"max_batch": 3, "prefill_chunk": 7},
        {"cache_tokens": 256},
        {"page_size": 4},
        {"fixed_draft": 13},
    ):
        engine = engine_with(name, tmp_path, **settings)
        for _ in range(2):  # the second time from the prefix cache
            completions = engine.generate(requests)
            assert [each.tokens for each in completions] == expected, settings
            accepted += sum(each.usage.accepted_tokens for each in completions)
        everything_is_back(engine)
    assert (accepted > 0) == (engine.drafter.lengths != (0,)), "nothing that it drafted was accepted"


@pytest.mark.parametrize("name", NAMES)
def test_log_probabilities_are_those_of_plain_decoding(name: str, tmp_path: Path) -> None:
    draw = random.Random(8)
    requests = [copying_request(draw, logprobs=3) for _ in range(10)]
    expected = tiny_engine(drafter="none").generate(requests)
    found = engine_with(name, tmp_path, fixed_draft=24).generate(requests)
    for left, right in zip(expected, found, strict=True):
        assert left.tokens == right.tokens
        for one, other in zip(left.logprobs, right.logprobs, strict=True):
            assert one.token == other.token and abs(one.logprob - other.logprob) < 1e-4
            assert [token for token, _ in one.top] == [token for token, _ in other.top]


@pytest.mark.parametrize("name", NAMES)
def test_deterministic_output_is_bit_by_bit_that_of_plain_decoding(name: str, tmp_path: Path) -> None:
    draw = random.Random(2)
    requests = [copying_request(draw, logprobs=1) for _ in range(8)]
    settings = {"dtype": "bfloat16", "deterministic": True, "shape": {"hidden_size": 64, "head_dim": 16}}
    expected = tiny_engine(**settings, drafter="none", prefix_cache=False, max_batch=1).generate(requests)
    found = engine_with(name, tmp_path, **settings, fixed_draft=20).generate(requests)
    assert [each.tokens for each in found] == [each.tokens for each in expected]
    assert [each.logprobs for each in found] == [each.logprobs for each in expected]


@pytest.mark.parametrize("name", NAMES)
def test_drafts_are_well_formed(name: str, observed: Callable[[Engine], Observed], tmp_path: Path) -> None:
    draw = random.Random(3)
    engine = engine_with(name, tmp_path, max_batch=4)
    proposals = observed(engine)
    engine.generate(variety(draw, 12))
    lengths = engine.drafter.lengths
    assert lengths[0] == 0 and list(lengths) == sorted(set(lengths)) and lengths[-1] <= MAX_DRAFT
    assert proposals
    for batch, draft in proposals:
        bounds = batch.query_starts.tolist()
        assert bounds[-1] == batch.num_queries == len(draft.tokens) == len(draft.marks) == len(draft.depths)
        for first, last in itertools.pairwise(bounds):
            parents, depths = draft.parents_of(first, last).tolist(), draft.depths[first:last].tolist()
            marks = draft.marks[first:last].tolist()
            assert parents[0] == depths[0] == marks[0] == 0
            for query in range(1, last - first):
                assert parents[query] < query and depths[query] == depths[parents[query]] + 1
            count = sum(each & DRAFTED for each in marks)
            assert all(marks[1 : count + 1]) and not any(marks[count + 1 :]), "padding comes last"
            if not engine.drafter.uses_sources:
                assert not any(each & FROM_SOURCE for each in marks)
    if name == "joint":
        assert any(draft.parents is not None and bool((draft.marks & FROM_MODEL).any()) for _, draft in proposals)


@pytest.mark.parametrize("name", NAMES)
def test_a_grammar_holds_over_drafts(name: str, tmp_path: Path) -> None:
    from tests.engine.test_grammar import TOKENIZER, tiny

    grammar = regex("(ab|ba|cc){8,20}")
    request = Request(TOKENIZER.encode("abba cc abba cc"), Sampling(max_tokens=40, grammar=grammar))
    expected = tiny(TOKENIZER, drafter="none").generate([request])[0]
    settings = settings_for(name, tmp_path, tiny(TOKENIZER).model.config)
    found = tiny(TOKENIZER, **settings, fixed_draft=16).generate([request])[0]
    assert found.error is None and found.tokens == expected.tokens and len(found.tokens) > 3


@pytest.mark.parametrize("name", NAMES)
def test_the_chooser_learns_from_steps_without_drafts_only_where_guesses_are_recorded(
    name: str, tmp_path: Path
) -> None:
    """Else it would count each as a miss, and stop drafting for good."""
    engine = engine_with(name, tmp_path)
    engine.runner.draft_lengths = (0,)
    before = engine._global_acceptance[False].new_request()
    expected = [[rate.value for rate in rates] for rates in before.rates]
    engine.generate([Request([1, 2, 3], Sampling(max_tokens=30, ignore_eos=True))])
    after = engine._global_acceptance[False].new_request()
    assert ([[rate.value for rate in rates] for rates in after.rates] != expected) == engine.drafter.records_guesses


def test_a_drafter_without_a_row_is_refused() -> None:
    with pytest.raises(ConfigError, match="drafter must be one of auto, copy, none"):
        tiny_engine(drafter="eagle")


def test_every_token_is_remembered_once_with_its_hidden_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """A drafter that asks for layers gets their states after each pass, of prompts too, one row a token."""
    engine = tiny_engine(drafter="ngram", prefill_chunk=4)
    tokens_seen: list[int] = []

    def remember(
        tokens: torch.Tensor, features: torch.Tensor, draft: Draft | None, batch: object, cache: object
    ) -> None:
        assert features.shape == (len(tokens), 2 * engine.model.config.hidden_size)
        assert torch.equal(features[:, : engine.model.config.hidden_size], engine.model.embedding[tokens])
        tokens_seen.extend(tokens.tolist())

    monkeypatch.setattr(engine.drafter, "features", (0, 2))
    monkeypatch.setattr(engine.drafter, "remember", remember)
    engine.runner.draft_lengths = (0,)
    prompt = [1, 2, 3, 1, 2, 7, 9, 4, 5]
    [completion] = engine.generate([Request(prompt, Sampling(max_tokens=6, ignore_eos=True))])
    assert tokens_seen == prompt + completion.tokens[:-1]


@pytest.mark.parametrize("name", ["eagle3", "dflash", "joint"])
def test_trained_drafters_draw_with_the_noise_of_the_target(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token k of a draft is drawn at the position at which the target chooses after the token before it."""
    drafted: list[tuple[list[int], list[int]]] = []
    chosen: list[tuple[list[int], list[int]]] = []

    def noting(found: list[tuple[list[int], list[int]]]) -> Callable[..., torch.Tensor]:
        def draw(logits: Any, best: Any, slots: torch.Tensor, positions: torch.Tensor, *rest: Any) -> torch.Tensor:
            found.append((slots.tolist(), positions.tolist()))
            return draw_op(logits, best, slots, positions, *rest)

        return draw

    monkeypatch.setattr("paceline.ops.choose.draw", noting(drafted))
    monkeypatch.setattr("paceline.engine.sampler.draw", noting(chosen))
    engine = engine_with(name, tmp_path, fixed_draft=3 if name != "joint" else 4)
    samplings = [Sampling(max_tokens=20, temperature=0.8, seed=seed, ignore_eos=True) for seed in range(2)]
    engine.generate([Request([5, 6, 7, 8], each) for each in samplings])
    levels = len(drafted) // (len(chosen) - 1)  # the first choices follow the prompts
    assert levels >= 2
    for number, (slots, positions) in enumerate(chosen[1:]):
        for level in range(levels):
            for slot, position in zip(*drafted[number * levels + level], strict=True):
                own = [each for other, each in zip(slots, positions, strict=True) if other == slot]
                assert position == own[0] + level


@pytest.mark.parametrize("name", ["copy", "eagle3", "dflash", "joint"])
def test_drawn_tokens_have_the_distribution_of_the_target(name: str, tmp_path: Path) -> None:
    """Chi-square over 100,000 tokens of a target whose next token depends on the last one alone."""
    shape = {"vocab_size": 12, "eos_tokens": ()}
    config = tiny_config(**shape)
    tensors = [
        (key, torch.zeros_like(each) if "o_proj" in key else each * (0.7 if "embed" in key else 1.0))
        for key, each in random_tensors(config)
    ]
    model = Decoder(config, tensors, torch.device("cpu"))
    settings = {**settings_for(name, tmp_path, config), "fixed_draft": 3, "max_batch": 64, "cache_tokens": 1 << 18}
    resolved = replace(tiny_engine(max_context=2048).config, **settings)
    engine = Engine(model, ByteTokenizer(), resolved)  # type: ignore[arg-type]
    sampling = [Sampling(max_tokens=1570, temperature=1.0, seed=seed, ignore_eos=True) for seed in range(64)]
    completions = engine.generate([Request([seed % 12, 3], each) for seed, each in enumerate(sampling)])
    counts = torch.zeros(12, 12, dtype=torch.float64)
    for completion in completions:
        tokens = torch.tensor([3, *completion.tokens])
        counts.index_put_((tokens[:-1], tokens[1:]), torch.ones(len(tokens) - 1, dtype=torch.float64), accumulate=True)
    assert counts.sum() > 100_000 and sum(each.usage.accepted_tokens for each in completions) > 1000
    expected = torch.cat([next_chances(model, token) for token in range(12)]) * counts.sum(1, keepdim=True)
    seen = expected >= 5
    statistic = float((((counts - expected) ** 2) / expected)[seen].sum())
    freedom = int(seen.sum()) - 12
    assert freedom > 60
    # the square of the deviation in units of its own: under 4.5 with all but one chance in 100,000
    assert (statistic - freedom) / (2 * freedom) ** 0.5 < 4.5


def next_chances(model: Decoder, token: int) -> torch.Tensor:
    """[1, V] float64: the chances of the token after `token`."""
    cache = KVCache(model.layout(16), 2, 1, torch.device("cpu"))
    model.prepare(1)
    one, zero = torch.ones(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    batch = AttentionBatch(
        zero.long(), one.long() * 16, one[None], zero, torch.tensor([0, 1], dtype=torch.int32), zero, 1, 0
    )
    return model.forward(torch.tensor([token]), cache, batch).logits.double().softmax(-1)
