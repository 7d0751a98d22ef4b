"""Export of drafters: the head of a quantised target is written out, and what is not this target's is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from paceline.drafters.checkpoint import read_checkpoint, vocabulary_digest, write_checkpoint
from paceline.drafters.config import DraftConfig
from paceline.errors import BadDrafter, ConfigError
from paceline.models.checkpoint import Checkpoint, open_checkpoint
from paceline.train.export import export_drafter, target_head
from tests.drafters.tiny_checkpoints import eagle3_config, random_eagle3
from tests.models.test_gguf import whole_model, write

TOKENS = torch.tensor([0, 2, 3, 7, 9, 11, 14, 15])


def tiny_target(path: Path, tied: bool = True) -> tuple[Checkpoint, Tensor]:
    """A GGUF model of 16 tokens with matrices in 8 bits, and its head as the library decodes it."""
    _, theirs = whole_model("llama", Kind.Q8_0, tied)
    name = "token_embd.weight" if tied else "output.weight"
    head = torch.from_numpy(gguf.dequantize(*theirs[name]).astype(numpy.float32))
    return open_checkpoint(write(path / "target.gguf", theirs, vocab=16)), head


def drafter_of(target: Checkpoint, path: Path, **changes: Any) -> DraftConfig:
    digests = {
        "target_digest": target.identity,
        "vocabulary_digest": vocabulary_digest(target.tokenizer()),
        "features": (1, 2),
    }
    config = eagle3_config(target.config, draft_vocab_size=len(TOKENS), **{**digests, **changes})
    tensors = {name: each.bfloat16() for name, each in random_eagle3(config).items()}
    write_checkpoint(path, config, tensors, TOKENS, card={"target": "ours", "tokens": 9})
    return config


@pytest.mark.parametrize("style", ["sglang", "vllm"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "own head"])
def test_the_targets_head_is_written_out(tmp_path: Path, style: str, tied: bool) -> None:
    target, head = tiny_target(tmp_path, tied)
    config = drafter_of(target, tmp_path / "drafter.safetensors")
    out = export_drafter(
        tmp_path / "drafter.safetensors", target, style, tmp_path / "new" / style, target_name="theirs"
    )
    found, source = read_checkpoint(out), read_checkpoint(tmp_path / "drafter.safetensors")
    assert found.config == config
    assert found.card == {"target": "theirs", "tokens": 9}
    assert found.draft_tokens is not None and torch.equal(found.draft_tokens, TOKENS)
    assert torch.equal(found.tensors.pop("lm_head.weight"), head[TOKENS].bfloat16())
    assert all(torch.equal(found.tensors[name], source.tensors[name]) for name in source.tensors)
    assert torch.equal(target_head(target, torch.float32), head)


def test_a_head_of_its_own_is_kept(tmp_path: Path) -> None:
    target, _ = tiny_target(tmp_path)
    config = eagle3_config(target.config, draft_vocab_size=len(TOKENS), features=(1, 2))
    own = torch.randn(len(TOKENS), target.config.hidden_size)
    write_checkpoint(tmp_path / "drafter", config, {**random_eagle3(config), "lm_head.weight": own}, TOKENS)
    out = export_drafter(tmp_path / "drafter", target, "vllm", tmp_path / "out")
    assert torch.equal(read_checkpoint(out).tensors["lm_head.weight"], own)


def test_an_exported_drafter_can_be_exported_again(tmp_path: Path) -> None:
    target, _ = tiny_target(tmp_path)
    drafter_of(target, tmp_path / "drafter")
    first = export_drafter(tmp_path / "drafter", target, "sglang", tmp_path / "sglang")
    again = export_drafter(first, target, "vllm", tmp_path / "vllm")
    one, two = read_checkpoint(first), read_checkpoint(again)
    assert one.config == two.config
    assert all(torch.equal(one.tensors[name], two.tensors[name]) for name in one.tensors)


def test_another_targets_drafter_needs_force(tmp_path: Path) -> None:
    target, _ = tiny_target(tmp_path)
    drafter_of(target, tmp_path / "drafter", target_digest="another")
    with pytest.raises(BadDrafter, match="trained for other weights"):
        export_drafter(tmp_path / "drafter", target, "vllm", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert export_drafter(tmp_path / "drafter", target, "vllm", tmp_path / "out", force=True).is_dir()


def test_another_tokenizer_is_refused_with_force_too(tmp_path: Path) -> None:
    target, _ = tiny_target(tmp_path)
    drafter_of(target, tmp_path / "drafter", vocabulary_digest="another")
    with pytest.raises(BadDrafter, match="another tokenizer"):
        export_drafter(tmp_path / "drafter", target, "vllm", tmp_path / "out", force=True)


def test_shapes_of_another_target_are_refused(tmp_path: Path) -> None:
    target, _ = tiny_target(tmp_path)
    wide = replace(target.config, hidden_size=64)
    config = eagle3_config(wide, draft_vocab_size=len(TOKENS), features=(1, 2))
    write_checkpoint(tmp_path / "drafter", config, random_eagle3(config), TOKENS)
    with pytest.raises(BadDrafter, match="reads states of 64 values, and the target's have 32"):
        export_drafter(tmp_path / "drafter", target, "vllm", tmp_path / "out", force=True)


def test_the_format_and_the_folder_are_checked_first(tmp_path: Path) -> None:
    target, _ = tiny_target(tmp_path)
    with pytest.raises(ConfigError, match="the format 'gguf' is not known; known: sglang, vllm"):
        export_drafter(tmp_path / "drafter", target, "gguf", tmp_path / "out")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("x")
    with pytest.raises(ConfigError, match="exists already"):
        export_drafter(tmp_path / "drafter", target, "vllm", tmp_path / "used")
