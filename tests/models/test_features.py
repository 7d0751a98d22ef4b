"""Hidden states that a drafter may ask for: those of transformers, at the layers asked for, whatever rows have logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from paceline.models.checkpoint import open_checkpoint
from paceline.models.decoder import Decoder
from paceline.ops.attention import AttentionBatch
from tests.models.test_logits import PAGE, assert_near, decoder, new_cache, prompt, reference

COUNT = 20


@torch.inference_mode()
def run(model: Decoder, rows: list[int] | None, want: tuple[int, ...], vocabulary: int = 257) -> Any:
    batch = AttentionBatch(
        positions=torch.arange(COUNT),
        locations=PAGE + torch.arange(COUNT),
        page_table=torch.tensor([[1, 2, 3]], dtype=torch.int32),
        context_lens=torch.zeros(1, dtype=torch.int32),
        query_starts=torch.tensor([0, COUNT], dtype=torch.int32),
        branch_starts=torch.zeros(COUNT, dtype=torch.int32),
        max_query=COUNT,
        max_context=0,
    )
    chosen = None if rows is None else torch.tensor(rows, dtype=torch.int64)
    return model.forward(torch.tensor(prompt(COUNT, vocabulary)), new_cache(model, COUNT), batch, chosen, want)


@pytest.mark.parametrize("kind", ["Llama", "Qwen3Moe"])
@pytest.mark.parametrize("rows", [None, [3, 19], []])
@pytest.mark.parametrize("want", [(0,), (1, 2), (3,), (2, 0, 3, 2)])
def test_features_are_the_hidden_states_of_transformers(
    kind: str, rows: list[int] | None, want: tuple[int, ...], tmp_path: Path
) -> None:
    theirs = reference(kind)
    theirs.save_pretrained(tmp_path)
    ours = decoder(open_checkpoint(tmp_path))
    found = run(ours, rows, want)
    states: dict[int, torch.Tensor] = {}
    layers = theirs.model.layers  # hidden_states[3] of transformers comes after the final norm, this one before
    hooks = [layers[-1].register_forward_hook(lambda _, __, output: states.update({3: output}))]
    with torch.inference_mode():
        output = theirs(torch.tensor([prompt(COUNT)]), output_hidden_states=True)
    hooks[0].remove()
    states = dict(enumerate(output.hidden_states[:3])) | {3: states[3]}
    expected = torch.cat([states[each][0] for each in want], dim=1)
    assert_near(found.features, expected)
    alone = run(ours, rows, ())
    assert alone.features is None and alone.logits.shape == found.logits.shape
    torch.testing.assert_close(alone.logits, found.logits, atol=1e-4, rtol=1e-4)
    if rows != []:
        assert_near(found.logits, output.logits[0] if rows is None else output.logits[0][rows])


def test_asking_changes_no_bit_of_the_logits_of_all_tokens(tmp_path: Path) -> None:
    reference("Qwen2").save_pretrained(tmp_path)
    ours = decoder(open_checkpoint(tmp_path))
    assert torch.equal(run(ours, None, (0, 1, 2, 3)).logits, run(ours, None, ()).logits)
