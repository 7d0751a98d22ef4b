"""Paceline: fast serving of open models to coding agents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from paceline.env import limit_openmp_spinning

if TYPE_CHECKING:
    from paceline.tasks.apply import Applied
    from paceline.tasks.compact import Compacted
    from paceline.tasks.scoring import ConversationMessage

__version__ = "0.1.0"
__all__ = ["__version__", "apply", "compact"]

limit_openmp_spinning()


def apply(
    code: str,
    edit: str,
    instruction: str = "",
    *,
    path: str | None = None,
    model: str = "qwen2.5-coder-1.5b",
    policy: str | None = None,
) -> Applied:
    """Merges an edit snippet into a file's text; see `paceline.tasks.apply.apply`.

    The model is loaded on first need and kept for the process.
    """
    from paceline.tasks.apply import apply as merge
    from paceline.tasks.apply import shared_engine

    return merge(lambda: shared_engine(model), code, edit, instruction, path=path, policy=policy)


def compact(
    messages: str | Sequence[ConversationMessage],
    query: str | None = None,
    *,
    ratio: float = 0.5,
    preserve_recent: int = 2,
) -> Compacted:
    """Context compaction by rule, without a model; see `paceline.tasks.compact.compact`."""
    from paceline.tasks.compact import compact as shorten

    return shorten(messages, query, ratio=ratio, preserve_recent=preserve_recent)
