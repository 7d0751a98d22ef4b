"""Export of a trained drafter to the servers that run it, SGLang and vLLM, and to Paceline's own file in fp8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paceline.drafters.checkpoint import check_target, read_checkpoint, vocabulary_digest, write_checkpoint
from paceline.errors import BadWeights, ConfigError
from paceline.models.checkpoint import Checkpoint

EXPORT_STYLES = ("sglang", "vllm", "paceline")
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def export_drafter(
    source: Path, target: Checkpoint, style: str, out: Path, *, target_name: str = "", force: bool = False
) -> Path:
    """Writes the drafter at `source` as the folder `out`, in the style "sglang" or "vllm"; returns `out`.

    In the style "paceline" `out` is one file with matrices in fp8 and no head that the drafter takes from its target.
    In the others a head that the drafter takes from its target is written out: the rows of the target's head that it drafts.
    `target_name` is what the folder says about its target (vLLM's verifier), by default what the card says.
    Raises ConfigError for an unknown style and an `out` that is in use, BadDrafter for a drafter that is damaged, is another
    target's (other weights of the same shapes pass with `force`), or has what the style cannot say.
    """
    if style not in EXPORT_STYLES:
        raise ConfigError(f"the format {style!r} is not known; known: {', '.join(EXPORT_STYLES)}")
    own = style == "paceline"
    if out.exists() and (own or not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists already: name a new {'file' if own else 'folder'}")
    drafter = read_checkpoint(source, target.config.num_layers)
    check_target(drafter, target.config, target.identity, force, vocabulary_digest(target.tokenizer()))
    card: dict[str, Any] = {**drafter.card, **({"target": target_name} if target_name else {})}
    if own:
        write_checkpoint(out, drafter.config, drafter.tensors, drafter.draft_tokens, card=card, float8=True)
        return out
    head = None
    if "lm_head.weight" not in drafter.tensors:
        head = target_head(target, drafter.tensors["fc.weight"].dtype)
    write_checkpoint(out, drafter.config, drafter.tensors, drafter.draft_tokens, style=style, card=card, head=head)
    return out


def target_head(target: Checkpoint, dtype: torch.dtype) -> Tensor:
    """The target's head [V, H], decoded from whatever its file stores; its embedding where the two are tied."""
    name = _EMBEDDING if target.config.tie_embeddings else _HEAD
    for each, stored in target.stored():
        if each == name:
            return stored.decode(dtype)
    raise BadWeights(f"the model has no {name}")
