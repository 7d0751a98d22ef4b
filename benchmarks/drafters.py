"""Curves of drafters' training: acceptance on held-out samples over tokens seen, of several runs side by side.

    python -m benchmarks.drafters --logs RUN... --out docs/images

A run is a folder of `paceline train drafter` or its log.jsonl, as PATH or NAME=PATH (default: the folder's name). Runs with the
same name are parts of one curve: those that went on from saved weights.

Prints three tables as Markdown and writes drafters.svg to --out (matplotlib, in the extra `train`):

- over tokens: the acceptance length (tokens a step, the target's own counted) at tokens seen a doubling apart, linear in their
  logarithm between two evaluations; at the end; and at the end on the samples that are trained on.
  Within a run the learning rate is still high: a run that ended there would stand higher.
- by task, at the end.
- by drafted position, at the end: the share of first choices accepted, given that those before were.

The figures are those of the logs: first choices along held-out texts. benchmarks/speculate.py measures in the engine.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.common import argument_parser, finish
from paceline.train.report import read_log

Line = dict[str, Any]
FIGURE = "drafters.svg"
_FIRST = 500_000  # tokens; before that a drafter has hardly begun


@dataclass
class Curve:
    """The lines of a log, or of several that follow each other, in the order of tokens."""

    name: str
    evaluations: list[Line] = field(default_factory=list)
    training: list[Line] = field(default_factory=list)

    def add(self, lines: Sequence[Line]) -> None:
        for kind, into in (("evaluation", self.evaluations), ("train", self.training)):
            into += [line for line in lines if line["kind"] == kind]
            into.sort(key=lambda line: line["tokens"])

    @property
    def last(self) -> Line:
        return self.evaluations[-1]

    def length_at(self, tokens: int) -> float | None:
        """The acceptance length at a number of tokens seen; None outside of the evaluations."""
        for before, after in pairwise(self.evaluations):
            if before["tokens"] <= tokens <= after["tokens"] and before["tokens"] < after["tokens"]:
                way = math.log(tokens / before["tokens"]) / math.log(after["tokens"] / before["tokens"])
                return float(before["length"] + way * (after["length"] - before["length"]))
        return None


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--logs", nargs="+", required=True, metavar="RUN", help="folders or log.jsonl, as PATH or NAME=PATH"
    )
    parser.add_argument("--out", type=Path, help=f"the folder to write {FIGURE} to")
    arguments = parser.parse_args()

    curves = read_curves(arguments.logs)
    tables = (over_tokens(curves), by_task(curves), by_position(curves))
    print("\n\n".join(markdown(table) for table in tables), flush=True)
    if arguments.out is not None:
        plot(curves, arguments.out / FIGURE)
    finish({"benchmark": "drafters", "tables": tables})


def read_curves(runs: Sequence[str]) -> list[Curve]:
    """The curves in the order in which their names come first. Exits with a sentence for a run without evaluations."""
    curves: dict[str, Curve] = {}
    for run in runs:
        name, _, rest = ("", "", run) if Path(run).exists() else run.partition("=")
        path = Path(rest)
        log = path / "log.jsonl" if path.is_dir() else path
        if not log.is_file():
            sys.exit(f"there is no log at {log}")
        lines = read_log(log)
        if not any(line["kind"] == "evaluation" for line in lines):
            sys.exit(f"{log} has no evaluation: the run held out no samples, or ended too soon")
        label = name or log.resolve().parent.name
        curves.setdefault(label, Curve(label)).add(lines)
    return list(curves.values())


def over_tokens(curves: Sequence[Curve]) -> list[dict[str, Any]]:
    """A row for each curve: lengths at tokens seen, by doublings, and at its end."""
    most = max(curve.last["tokens"] for curve in curves)
    marks = [_FIRST << power for power in range(64) if _FIRST << power <= most]
    rows = []
    for curve in curves:
        row: dict[str, Any] = {"run": curve.name}
        row |= {millions(tokens): rounded(curve.length_at(tokens)) for tokens in marks}
        row |= {"tokens seen": millions(curve.last["tokens"]), "passes": curve.last["epoch"]}
        row |= {"at the end": rounded(curve.last["length"])}
        row |= {"trained on": rounded(curve.training[-1]["length"] if curve.training else None)}
        rows.append(row)
    return rows


def by_task(curves: Sequence[Curve]) -> list[dict[str, Any]]:
    tasks = sorted({task for curve in curves for task in curve.last["by_task"]})
    rows = []
    for curve in curves:
        found = curve.last["by_task"]
        lengths = {task or "-": rounded(found[task]["length"]) if task in found else None for task in tasks}
        rows.append({"run": curve.name, "all": rounded(curve.last["length"]), **lengths})
    return rows


def by_position(curves: Sequence[Curve]) -> list[dict[str, Any]]:
    count = max(len(curve.last["acceptance"]) for curve in curves)
    rows = []
    for curve in curves:
        rates = [*curve.last["acceptance"], *[None] * count][:count]
        rows.append({"run": curve.name, **{str(k): rounded(rate, 3) for k, rate in enumerate(rates, 1)}})
    return rows


def millions(tokens: int) -> str:
    """A number of tokens as a heading: 0.5M, 1M, 33.6M."""
    return f"{tokens / 1e6:.1f}".removesuffix(".0") + "M"


def rounded(value: float | None, digits: int = 2) -> float | None:
    return None if value is None else round(value, digits)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Rows with the same keys as a table; an empty cell for None."""
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [["" if value is None else str(value) for value in row.values()] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plot(curves: Sequence[Curve], path: Path) -> None:
    """Writes the figure: length over tokens, and acceptance by position at the end. Exits where matplotlib is missing."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        sys.exit("plots need matplotlib: pip install 'paceline[train]'")
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "paceline"  # the same logs give the same file
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    for curve in curves:
        points = [line for line in curve.evaluations if line["tokens"] > 0]
        left.plot(
            [each["tokens"] for each in points], [each["length"] for each in points], "o-", ms=3, label=curve.name
        )
        rates = curve.last["acceptance"]
        right.plot(range(1, len(rates) + 1), rates, "o-", ms=3, label=curve.name)
    left.set(xscale="log", xlabel="tokens seen", ylabel="acceptance length, held out")
    right.set(xlabel="drafted position", ylabel="accepted, given those before", ylim=(0, 1))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
