"""Runs that go on from a drafter's weights alone, in a folder of their own."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from paceline.drafters.checkpoint import read_checkpoint, write_checkpoint
from paceline.errors import BadDrafter, ConfigError
from paceline.train.report import read_log
from paceline.train.run import DRAFTER_FILE, DrafterOptions, TrainingRun
from paceline.train.state import TrainState
from tests.train.data import OPTIONS, random_samples, tiny_run, write

UNSAID = DrafterOptions(steps=3)
DFLASH = DrafterOptions("dflash", 64, 48, steps=3, layers=1, markov_rank=8)


@pytest.fixture(scope="module", params=[OPTIONS, DFLASH], ids=lambda options: options.kind)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A drafter, and the card of its run."""
    folder = tmp_path_factory.mktemp("first")
    samples = write(folder / "data.bin", random_samples(60))
    held_out = write(folder / "held_out.bin", random_samples(12, seed=1))
    card = tiny_run(folder, options=request.param, tokens=12000).train([samples], [held_out])
    return folder / DRAFTER_FILE, card


def going_on(folder: Path, start: Path, options: DrafterOptions, **changes: Any) -> TrainingRun:
    return dataclasses.replace(tiny_run(folder, options=options, **changes), start=start)


def state_of(folder: Path) -> TrainState:
    state = TrainState.load(folder / "state.pt")
    assert state is not None
    return state


def options_of(card: dict[str, Any]) -> DrafterOptions:
    """The options of a card, without the sizes that the drafter says itself."""
    return dataclasses.replace(DrafterOptions(**card["options"]), draft_vocab_size=None, intermediate_size=None)


def test_weights_draft_vocabulary_and_counts_are_kept(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    start, card = trained
    other = write(
        tmp_path / "other.bin", random_samples(50, seed=5, vocab_size=40)
    )  # its counts would choose other tokens
    run = going_on(tmp_path / "same", start, options_of(card), tokens=card["tokens"])
    same = run.train([other], [start.parent / "held_out.bin"])
    begun, drafter = state_of(tmp_path / "same"), read_checkpoint(start)
    assert (same["tokens"], same["supervised"], begun.steps) == (card["tokens"], card["supervised"], 0)
    assert all(torch.equal(begun.tensors[name], each.float()) for name, each in drafter.tensors.items())
    assert drafter.draft_tokens is not None and torch.equal(begun.draft_tokens, drafter.draft_tokens)
    assert begun.vocabulary_share < card["draft_vocab_share"]
    assert same["evaluation"]["loss"] == pytest.approx(card["evaluation"]["loss"], rel=0.01)


def test_a_run_learns_on_and_its_tokens_add_up(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    start, card = trained
    samples = write(tmp_path / "data.bin", random_samples(60))
    run = going_on(tmp_path / "second", start, options_of(card), tokens=30000)
    second = run.train([samples])
    assert second["tokens"] >= 30000 and second["tokens_before"] == card["tokens"]
    assert second["supervised"] > card["supervised"] and second["minutes"] > card["minutes"]
    passes = (second["tokens"] - card["tokens"]) / second["data"]["tokens"]
    assert second["epochs"] == pytest.approx(card["epochs"] + passes, abs=0.02)
    log = read_log(tmp_path / "second" / "log.jsonl")
    assert log[0]["tokens"] > card["tokens"] and log[0]["epoch"] > card["epochs"] - 1
    assert f"{card['tokens']:,} of them in earlier runs" in (tmp_path / "second" / "card.md").read_text()
    third = going_on(tmp_path / "third", tmp_path / "second" / DRAFTER_FILE, options_of(card), tokens=31000)
    assert third.train([samples])["tokens_before"] == second["tokens"]


def test_a_killed_run_continues_from_its_own_state(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    start, card = trained
    samples = write(tmp_path / "data.bin", random_samples(60))
    first = going_on(tmp_path / "run", start, options_of(card), tokens=14000).train([samples])
    second = going_on(tmp_path / "run", start, options_of(card), tokens=16000).train([samples])
    assert second["steps"] > first["steps"] > 0 and second["tokens_before"] == card["tokens"]


def test_other_drafters_are_refused(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    start, card = trained
    samples, options = write(tmp_path / "data.bin", random_samples(60)), options_of(card)
    kind = "eagle3" if options.kind == "dflash" else "dflash"
    changes: list[tuple[dict[str, Any], str]] = [
        ({"kind": kind}, f"its kind is '{card['kind']}', not '{kind}'"),
        ({"intermediate_size": 32}, "its layer.intermediate_size is 48, not 32"),
        ({"draft_vocab_size": 80}, "its draft_vocab_size is 64, not 80"),
    ]
    if options.kind == "dflash":
        changes += [({"steps": 5}, "its block_size is 3, not 5"), ({"layers": 2}, "its layer.num_layers is 1, not 2")]
    for change, message in changes:
        with pytest.raises(ConfigError, match=message):
            going_on(tmp_path / "run", start, dataclasses.replace(options, **change)).train([samples])
    run = going_on(tmp_path / "run", start, options)
    for target, message in (("identity", "other weights"), ("vocabulary", "another tokenizer")):
        drafter = read_checkpoint(start)
        config = dataclasses.replace(drafter.config, target_digest="identity", vocabulary_digest="tokens")
        file = tmp_path / f"{target}.safetensors"
        write_checkpoint(file, config, drafter.tensors, drafter.draft_tokens)
        another = dataclasses.replace(run.target, **{target: "another"})
        with pytest.raises(BadDrafter, match=message):
            dataclasses.replace(run, target=another, start=file).train([samples])
    with pytest.raises(BadDrafter, match="there is no drafter at"):
        dataclasses.replace(run, start=tmp_path / "none.safetensors").train([samples])
    assert not (tmp_path / "run" / "state.pt").exists()


def test_a_head_of_its_own_is_refused(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    start, card = trained
    drafter, file = read_checkpoint(start), tmp_path / "own.safetensors"
    head = torch.zeros(drafter.config.draft_vocab_size, drafter.config.layer.hidden_size)
    write_checkpoint(file, drafter.config, {**drafter.tensors, "lm_head.weight": head}, drafter.draft_tokens)
    samples = write(tmp_path / "data.bin", random_samples(20))
    with pytest.raises(BadDrafter, match=r"has lm_head\.weight; training goes on with the target's"):
        going_on(tmp_path / "run", file, options_of(card)).train([samples])


def test_the_whole_vocabulary_stays_whole(tmp_path: Path) -> None:
    samples = write(tmp_path / "data.bin", random_samples(30))
    options = DrafterOptions(draft_vocab_size=1000, intermediate_size=48, steps=2)
    tiny_run(tmp_path / "first", options=options, tokens=500).train([samples])
    start = tmp_path / "first" / DRAFTER_FILE
    card = going_on(tmp_path / "second", start, dataclasses.replace(UNSAID, steps=2), tokens=2000).train([samples])
    assert card["draft_vocab_size"] == 258 and card["draft_vocab_share"] == 1
