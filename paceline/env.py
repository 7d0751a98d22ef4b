"""The environment variables Paceline reads. There are no others."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Where models are kept: `PACELINE_CACHE`, else `$XDG_CACHE_HOME/paceline`, else `~/.cache/paceline`."""
    explicit = os.environ.get("PACELINE_CACHE")
    if explicit:
        return Path(explicit)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "paceline"


def api_key() -> str | None:
    """A key that clients of `paceline serve` must send: `PACELINE_API_KEY`. Empty is none."""
    return os.environ.get("PACELINE_API_KEY") or None
