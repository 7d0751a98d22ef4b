"""Offline evaluation: what a run of training finds on its held-out samples, for any drafter that can be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from paceline.drafters.checkpoint import DraftCheckpoint, read_checkpoint
from paceline.errors import BadDrafter, InputError
from paceline.train.evaluate import evaluate, table
from paceline.train.run import DRAFTER_FILE, DrafterOptions
from paceline.train.samples import Sample
from tests.train.data import OPTIONS, random_samples, tiny_run, write

DFLASH = DrafterOptions("dflash", 64, 48, steps=3, layers=1, markov_rank=8)


@pytest.mark.parametrize("options", [OPTIONS, DFLASH], ids=lambda options: options.kind)
def test_it_is_the_evaluation_of_training(tmp_path: Path, options: DrafterOptions) -> None:
    held_out = random_samples(12, seed=3)
    files = [write(tmp_path / f"{name}.bin", each) for name, each in (("a", random_samples(40)), ("b", held_out))]
    run = tiny_run(tmp_path, options=options, tokens=8000)
    expected = run.train(files[:1], files[1:])["evaluation"]
    found = evaluate(read_checkpoint(tmp_path / DRAFTER_FILE), run.target, held_out, steps=3, row_length=96)
    assert (found["kind"], found["samples"]) == (options.kind, 12)
    assert found["predicted"] == sum(each.num_supervised for each in held_out)
    # its weights are in bf16 now; training evaluates a block drafter on half of the places
    assert found["loss"] == pytest.approx(expected["loss"], rel=0.02 if options.kind == "eagle3" else 0.25)
    assert found["length"] == pytest.approx(expected["length"], abs=0.03)
    other_rows = evaluate(read_checkpoint(tmp_path / DRAFTER_FILE), run.target, held_out, steps=3, row_length=50)
    assert other_rows["loss"] == pytest.approx(found["loss"], rel=1e-3) and other_rows["length"] == found["length"]
    assert found["by_task"].keys() == expected["by_task"].keys() == {"code"}
    assert table(found).startswith("task      length      1      2      3\nall") and "code" not in table(found)


def test_heads_and_embeddings_of_a_drafters_own_are_used(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, tokens=3000)
    run.train([write(tmp_path / "data.bin", random_samples(40))])
    drafter, samples = read_checkpoint(tmp_path / DRAFTER_FILE), random_samples(10, seed=3)

    def loss(**own: torch.Tensor) -> Any:
        names = {name.replace("_weight", ".weight"): each for name, each in own.items()}
        with_own = DraftCheckpoint(drafter.config, {**drafter.tensors, **names}, drafter.draft_tokens)
        return evaluate(with_own, run.target, samples, steps=2, row_length=96)["loss"]

    model = run.target.model
    head = model.head_rows(drafter.draft_tokens)
    assert loss(lm_head_weight=head, embed_tokens_weight=model.embedding) == loss()
    assert loss(lm_head_weight=torch.zeros_like(head)) != loss()
    assert loss(embed_tokens_weight=torch.zeros_like(model.embedding)) != loss()


def test_what_cannot_be_evaluated_is_refused(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, tokens=500)
    run.train([write(tmp_path / "data.bin", random_samples(40))])
    drafter, samples = read_checkpoint(tmp_path / DRAFTER_FILE), random_samples(4)
    other = tiny_run(tmp_path).target.__class__(run.target.model, "other", "other", ())
    with pytest.raises(BadDrafter, match="trained for other weights"):
        evaluate(drafter, other, samples, row_length=96)
    assert evaluate(drafter, other, samples, row_length=96, force=True)["samples"] == 4
    nothing = [Sample(each.prompt_key, each.task, each.tokens, ()) for each in samples]
    with pytest.raises(InputError, match="4 with an empty loss mask"):
        evaluate(drafter, run.target, nothing, row_length=96)
