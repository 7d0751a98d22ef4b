"""All environment variables that Paceline reads, and the one that it sets."""

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


def limit_openmp_spinning() -> None:
    """Sets `GOMP_SPINCOUNT`: OpenMP's threads spin for microseconds at a barrier, then sleep. Call it before importing torch.

    By default they spin for milliseconds. If another process then needs a core, each of a step's hundreds of barriers takes
    that long. A value in the environment takes precedence.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def api_key() -> str | None:
    """The key that clients of `paceline serve` must send: `PACELINE_API_KEY`. An empty value means none."""
    return os.environ.get("PACELINE_API_KEY") or None


def trace_endpoint() -> str | None:
    """Where OpenTelemetry's exporter sends traces: `OTEL_EXPORTER_OTLP_ENDPOINT`. Without it no traces are sent."""
    return os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or None
