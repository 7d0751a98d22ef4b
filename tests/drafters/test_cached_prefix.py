"""What a trained drafter keeps in the cache: drafts after a cached prefix are those without a cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from paceline.types import Request, Sampling
from tests.drafters.test_eagle3 import drafts_of
from tests.drafters.tiny_checkpoints import engine_with


@pytest.mark.parametrize("page_size", [4, 16])
@pytest.mark.parametrize(("name", "fixed_draft"), [("eagle3", 4), ("dflash", 5)])
def test_drafts_after_a_cached_prefix_are_those_without_a_cache(
    name: str, fixed_draft: int, page_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole prompts, prompts that share a part, and a continued conversation; also where pages end."""
    shared = [(7 * each) % 200 for each in range(64)]
    prompts = [shared[:count] + tail for count in (32, 33, 48, 64) for tail in ([], [5], [9, 9, 200])]
    settings = {"page_size": page_size, "fixed_draft": fixed_draft}
    warm = engine_with(name, tmp_path, **settings)
    hits = 0
    for prompt in [*prompts, *prompts]:
        request = Request(prompt, Sampling(max_tokens=9, ignore_eos=True))
        cold = engine_with(name, tmp_path, prefix_cache=False, **settings)
        assert drafts_of(warm, request, monkeypatch) == drafts_of(cold, request, monkeypatch)
        [completion] = warm.generate([request])
        hits += completion.usage.cached_tokens
        longer = Request(prompt + completion.tokens + [1, 2], Sampling(max_tokens=9, ignore_eos=True))
        assert drafts_of(warm, longer, monkeypatch) == drafts_of(cold, longer, monkeypatch)
    assert hits > 500
