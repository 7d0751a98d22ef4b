"""What a run says while it trains: a line of JSON for each measurement, and plots where matplotlib is installed."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paceline.errors import InputError


class RunLog:
    """Lines of JSON, each with `kind`, `step` and `tokens`; a short form goes to standard error."""

    def __init__(self, path: Path, tokens: int, writes: bool) -> None:
        """Drops lines beyond `tokens`, which a killed run wrote after its last save."""
        self._path, self._writes = path, writes
        if writes and path.exists():
            kept = [line for line in read_log(path) if line["tokens"] <= tokens]
            partial = path.with_suffix(".partial")
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
            os.replace(partial, path)

    def write(
        self, kind: str, position: Mapping[str, Any], values: Mapping[str, Any], progress: float | None = None
    ) -> None:
        if not self._writes:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(json.dumps({"kind": kind, **position, **values}) + "\n")
        done = "" if progress is None else f" {progress:4.0%}"
        speed = f", {values['tokens_per_second']:,} tokens/s" if "tokens_per_second" in values else ""
        rates = " ".join(f"{each:.2f}" for each in values["acceptance"])
        print(
            f"{kind}{done}: {position['tokens']:,} tokens, loss {values['loss'][0]:.3f}, "
            f"accepted {values['length']:.2f} [{rates}]{speed}",
            file=sys.stderr,
            flush=True,
        )


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a last one that a kill has cut short is left out. Raises InputError for another that is damaged."""
    *lines, _ = path.read_text().split("\n") if path.exists() else [""]  # what ends in no newline is cut short
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise InputError(f"the log {path} is damaged: {error}; delete it to go on without it") from error


def write_plots(run: Path) -> bool:
    """acceptance.svg and acceptance.png: loss and acceptance over tokens. False where matplotlib is not installed."""
    try:
        import matplotlib  # type: ignore[import-not-found, unused-ignore]
    except ModuleNotFoundError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot  # type: ignore[import-not-found, unused-ignore]

    log = read_log(run / "log.jsonl")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    for kind, style in (("train", "-"), ("evaluation", "o-")):
        lines = [line for line in log if line["kind"] == kind and line["tokens"] > 0]
        tokens = [line["tokens"] for line in lines]
        left.plot(tokens, [line["length"] for line in lines], style, label=kind, markersize=3)
        if kind == "evaluation" and lines:
            for k in range(len(lines[0]["acceptance"])):
                right.plot(tokens, [line["acceptance"][k] for line in lines], "o-", label=f"{k + 1}", markersize=3)
    left.set(xscale="log", xlabel="tokens seen", ylabel="acceptance length")
    right.set(xscale="log", xlabel="tokens seen", ylabel="acceptance by drafted position, held out")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.tight_layout()
    figure.savefig(run / "acceptance.svg")
    figure.savefig(run / "acceptance.png", dpi=120)
    pyplot.close(figure)
    return True
