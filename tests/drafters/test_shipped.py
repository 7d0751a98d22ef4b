"""The drafters that come with Paceline are found by the model's identity, and used without being asked for."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from paceline.drafters import shipped
from paceline.drafters.checkpoint import read_checkpoint
from paceline.drafters.joint import JointDrafter
from paceline.engine.engine import Engine
from tests.drafters.tiny_checkpoints import tiny_eagle3
from tests.tiny import ByteTokenizer, tiny_config, tiny_engine

FOLDER = Path(shipped.__file__).parent
LIMITS = {"smollm2-135m": 24_000_000, "qwen2.5-coder-1.5b": 48_000_000}  # bytes


def test_every_shipped_drafter_can_be_read_and_is_small() -> None:
    files = sorted(FOLDER.glob("*.safetensors"))
    assert files
    for path in files:
        assert path.stat().st_size <= LIMITS[path.stem]
        checkpoint = read_checkpoint(path)
        assert checkpoint.config.target_digest and checkpoint.config.vocabulary_digest
        assert shipped.shipped_drafter(checkpoint.config.target_digest) == path
        assert checkpoint.card["tokens"] > 0 and checkpoint.card["evaluation"]["length"] > 1
    assert shipped.shipped_drafter("of no model") is None


def test_auto_takes_the_drafter_of_the_model_and_copies_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(shipped.__file__, tmp_path / "__init__.py")
    tiny_eagle3(tmp_path / "tiny.safetensors", tiny_config(), target_digest="tiny")
    monkeypatch.setattr(shipped, "__file__", str(tmp_path / "__init__.py"))
    engine = tiny_engine(drafter="auto")
    assert engine.config.drafter == "copy"
    engine.model.identity = "tiny"
    auto = replace(engine.config, drafter="auto")
    found = Engine(engine.model, ByteTokenizer(), auto)  # type: ignore[arg-type]
    assert isinstance(found.drafter, JointDrafter) and found.config.draft_model == str(tmp_path / "tiny.safetensors")
    alone = Engine(engine.model, ByteTokenizer(), replace(auto, drafter="eagle3"))  # type: ignore[arg-type]
    assert alone.config.draft_model == found.config.draft_model
    exact = Engine(engine.model, ByteTokenizer(), replace(auto, deterministic=True))  # type: ignore[arg-type]
    assert exact.config.drafter == "copy"
    given = tiny_engine(drafter="auto", draft_model=str(tmp_path / "tiny.safetensors"))
    assert given.config.drafter == "joint"
