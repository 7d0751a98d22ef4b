"""The environment variables Paceline reads, and the one it sets. There are no others."""

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


def settle_threads() -> None:
    """Lets OpenMP's threads wait for each other a few microseconds only before they sleep; before torch is imported.

    Left alone they spin for milliseconds, and where another process wants a core, every one of a step's hundreds of waits
    lasts as long. `GOMP_SPINCOUNT` in the environment wins.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def api_key() -> str | None:
    """A key that clients of `paceline serve` must send: `PACELINE_API_KEY`. Empty is none."""
    return os.environ.get("PACELINE_API_KEY") or None


def trace_endpoint() -> str | None:
    """Where OpenTelemetry's exporter sends traces: `OTEL_EXPORTER_OTLP_ENDPOINT`. Without it there are none."""
    return os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or None
