"""The joint drafter: what happens to caches and records when guesses are accepted, on the chain and beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from paceline.drafters.base import DraftBatch
from paceline.drafters.joint import JointDrafter
from paceline.drafters.trees import BESIDE_BEAMS, BESIDE_CHAIN, BLOCKS, SHAPES
from paceline.engine.engine import Engine
from paceline.engine.scheduler import Decode
from paceline.ops.choose import MAX_CANDIDATES
from paceline.ops.join_drafts import Guesses
from paceline.types import Request, Sampling
from tests.drafters.test_eagle3 import drafts_of
from tests.drafters.tiny_checkpoints import engine_with, tiny_dflash
from tests.tiny import tiny_config, tiny_engine

PROMPTS = [[5, 6, 7, 8], list(range(40, 61)), [9] * 16]


def plain_outputs(**settings: Any) -> list[list[int]]:
    requests = [Request(prompt, Sampling(max_tokens=40, ignore_eos=True)) for prompt in PROMPTS]
    return [each.tokens for each in tiny_engine(drafter="none", **settings).generate(requests)]


def knowing(engine: Engine, outputs: list[list[int]], wrong_every: int) -> Any:
    """Guesses of what comes: on the chain, but at every `wrong_every`th token of a text as the second candidate."""
    texts = [prompt + output for prompt, output in zip(PROMPTS, outputs, strict=True)]

    def guess(batch: DraftBatch, depth: int, width: int, beams: int = 1) -> Guesses:
        tokens = torch.zeros(len(batch.slots), depth, width, dtype=torch.int64)
        for row, slot in enumerate(batch.slots.tolist()):
            begin, end = int(batch.state.history_start[slot]), int(batch.state.end[slot])
            own = batch.state.text[slot, begin:end].tolist()
            whole = next(text for text in texts if text[: len(own)] == own)
            for level, token in enumerate(whole[len(own) : len(own) + depth]):
                candidates = [token, *((token + each) % 250 for each in range(1, width))]
                if width > 1 and (len(own) + level) % wrong_every == 0:
                    candidates[:2] = candidates[1], candidates[0]
                tokens[row, level] = torch.tensor(candidates)
        logprobs = torch.tensor([-0.01, -0.7, -1.5])[:width].expand(len(tokens), depth, width)
        return Guesses(tokens, logprobs.contiguous())

    return guess


@pytest.mark.parametrize("wrong_every", [3, 5, 1000])
def test_accepted_guesses_leave_the_cache_as_plain_decoding_does(
    wrong_every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = plain_outputs()
    warm = engine_with("joint", tmp_path, fixed_draft=11)
    drafter = warm.drafter
    assert isinstance(drafter, JointDrafter)
    requests = [Request(prompt, Sampling(max_tokens=40, ignore_eos=True)) for prompt in PROMPTS]
    with monkeypatch.context() as patch:
        patch.setattr(drafter.trained, "guess", knowing(warm, outputs, wrong_every))
        completions = warm.generate(requests)
    assert [each.tokens for each in completions] == outputs
    accepted = sum(each.usage.accepted_tokens / each.usage.steps for each in completions) / len(completions)
    assert accepted > (4 if wrong_every == 1000 else 1.5)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        longer = Request(prompt + output + [1, 2], Sampling(max_tokens=9, ignore_eos=True))
        cold = engine_with("joint", tmp_path, fixed_draft=11, prefix_cache=False)
        assert drafts_of(warm, longer, monkeypatch) == drafts_of(cold, longer, monkeypatch)
        [completion] = warm.generate([longer])
        assert completion.usage.cached_tokens >= (len(prompt) + len(output) - 1) // 16 * 16


def test_a_draft_that_is_cut_keeps_the_guesses_that_fit(tmp_path: Path) -> None:
    drafter = engine_with("joint", tmp_path).drafter
    assert isinstance(drafter, JointDrafter)
    for length in range(64):
        depth, beside, continues = drafter.guessed(length)
        assert depth <= length
        if length in drafter.trees.shapes:
            shape = drafter.trees.shapes[length]
            assert depth == shape.depth and continues == (shape.beams > 1)
            assert beside == (BESIDE_BEAMS[shape.beams] if continues else BESIDE_CHAIN[shape.width])
        elif length in drafter.copy.lengths or length == 0:
            assert depth == 0
        else:
            smaller = [each for each in drafter.trees.shapes if each < length]
            assert depth == (length if length < 4 else drafter.trees.shapes[max(smaller)].depth)
    assert drafter.guessed(256).depth == 0


def test_a_block_drafter_is_not_asked_for_more_than_its_block(tmp_path: Path) -> None:
    path = tmp_path / "block.safetensors"
    tiny_dflash(path, tiny_config(), block_size=4)
    engine = tiny_engine(drafter="joint", draft_model=str(path), fixed_draft=23)
    drafter = engine.drafter
    assert isinstance(drafter, JointDrafter)
    assert max(drafter.guessed(length).depth for length in drafter.lengths) == drafter.trained.most_guesses <= 4
    expected = plain_outputs()
    requests = [Request(prompt, Sampling(max_tokens=40, ignore_eos=True)) for prompt in PROMPTS]
    assert [each.tokens for each in engine.generate(requests)] == expected


def test_beams_have_places_for_their_passes() -> None:
    for shapes in (SHAPES, BLOCKS):
        for length, (depth, width, beams) in shapes.items():
            assert depth <= length and depth * width >= length - depth and width >= beams
            assert beams == 1 or shapes is BLOCKS or (depth - 1) * beams <= length
            assert (width in BESIDE_CHAIN and width <= MAX_CANDIDATES) if beams == 1 else beams in BESIDE_BEAMS


@pytest.mark.parametrize("length", [15, 23, 31])
def test_trees_of_beams_give_the_output_of_plain_decoding(length: int, tmp_path: Path) -> None:
    engine = engine_with("joint", tmp_path, fixed_draft=length, max_batch=2)
    assert isinstance(engine.drafter, JointDrafter) and engine.drafter.trees.shapes[length].beams > 1
    requests = [Request(prompt, Sampling(max_tokens=40, ignore_eos=True)) for prompt in PROMPTS]
    assert [each.tokens for each in engine.generate(requests)] == plain_outputs()


def test_requests_of_different_lengths_share_the_passes_of_a_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_with("joint", tmp_path, max_batch=3)
    lengths = iter([31, 2, 15] * 400)
    monkeypatch.setattr("paceline.engine.lengths.choose_each", lambda records, *_: [next(lengths) for _ in records])
    requests = [Request(prompt, Sampling(max_tokens=40, ignore_eos=True)) for prompt in PROMPTS]
    assert [each.tokens for each in engine.generate(requests)] == plain_outputs()


def test_a_step_is_compared_with_what_was_expected_of_it(tmp_path: Path) -> None:
    """On a GPU the next step's draft is chosen before a step is read."""
    engine = engine_with("joint", tmp_path, max_batch=1)
    engine.submit(Request(PROMPTS[0], Sampling(max_tokens=40, ignore_eos=True)))
    engine.step()
    [sequence] = engine.scheduler.running
    sequence.acceptance.expected = 2.5
    step = engine.runner.launch(Decode([sequence], [7]))
    sequence.acceptance.expected = 0.0
    [(_, result)] = step.read()
    assert result.length == 7 and result.expected == 2.5


@pytest.mark.parametrize("kind", ["eagle3", "joint"])
def test_a_draft_longer_than_a_tree_and_one_of_a_single_token(kind: str, tmp_path: Path) -> None:
    requests = [Request(prompt, Sampling(max_tokens=40, ignore_eos=True)) for prompt in PROMPTS]
    for settings in ({"fixed_draft": 70}, {"fixed_draft": 1}, {"fixed_draft": 3}, {"max_draft": 1}):
        engine = engine_with(kind, tmp_path, **settings)
        completions = engine.generate(requests)
        assert [each.tokens for each in completions] == plain_outputs()
        assert sum(each.usage.drafted_tokens for each in completions) > 0
