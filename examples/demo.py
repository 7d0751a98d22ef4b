"""Merges a real commit's edit with a real code model, with and without drafts, side by side in the terminal.

python examples/demo.py [--model NAME] [--edit FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from paceline.cli import DEFAULT_MODEL, pull_with_progress
from paceline.config import EngineConfig
from paceline.engine.engine import Engine
from paceline.models.pull import MODELS
from paceline.tasks.apply import Applied, Prepared, prepare
from paceline.tasks.snippet import snippet_of
from paceline.types import FinishReason, StepOutput, Usage

_PANEL_LINES = 24
_VISIBLE_TOKENS = 400  # tokens that fit in a panel
_PLAIN_LIMIT = 60.0  # seconds after which plain decoding is stopped


@dataclass
class Side:
    """One half of the view: the text so far, with accepted draft tokens in green, and the token rate."""

    title: str
    pieces: list[tuple[str, bool]] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    usage: Usage | None = None
    finish: FinishReason | None = None

    def add(self, output: StepOutput, decode: list[str], seconds: float) -> None:
        self.pieces += zip(decode, output.accepted, strict=True)
        self.tokens += len(output.tokens)
        self.seconds = seconds
        self.usage, self.finish = output.usage, output.finish

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def render(self) -> Panel:
        text = Text(no_wrap=True, overflow="crop")
        for piece, drafted in self.pieces[-_VISIBLE_TOKENS:]:
            text.append(piece, style="green" if drafted else "bold white")
        shown = Text("\n", no_wrap=True, overflow="crop").join(text.split("\n")[-_PANEL_LINES:])
        state = f"{self.tokens} tokens, {self.rate:.1f} tokens/s" if self.tokens else "waiting"
        return Panel(shown, title=self.title, subtitle=state, height=_PANEL_LINES + 2)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--edit", type=Path, default=Path(__file__).with_name("edit.json"))
    arguments = parser.parse_args()
    console = Console()
    edit = json.loads(arguments.edit.read_text(encoding="utf-8"))
    size = MODELS[arguments.model].size / 1e9 if arguments.model in MODELS else 0
    console.print(f"Model: {arguments.model}" + (f" ({size:.1f} GB to fetch, once)" if size else ""))
    path = pull_with_progress(arguments.model)
    began = time.perf_counter()
    with console.status("loading the model ..."):
        engine = Engine.load(path, EngineConfig(max_context=8192))
        plain = engine.sibling(dataclasses.replace(engine.config, drafter="none"))
        engine.warm_up()
        plain.warm_up()
    console.print(f"Loaded in {time.perf_counter() - began:.0f} s on {engine.config.device}.")
    snippet = snippet_of(edit["before"], edit["after"], edit["path"])
    console.print(
        f"\nThe edit of {edit['repo']}@{edit['commit'][:10]} ({edit['subject']}), as a coding agent would send it:"
    )
    console.print(Syntax(snippet, "python", theme="ansi_dark", background_color="default"))
    drafted, undrafted, applied = side_by_side(console, engine, plain, edit, snippet)
    conclude(console, edit, applied, drafted, undrafted)
    console.print(f"All of it took {time.perf_counter() - began:.0f} s.")


def side_by_side(
    console: Console, engine: Engine, plain: Engine, edit: dict[str, str], snippet: str
) -> tuple[Side, Side, Applied]:
    """Runs the same request with and without drafts, one after the other, and shows both live."""
    prepared = prepare(engine, edit["before"], snippet, edit["subject"], path=edit["path"], policy="review")
    assert isinstance(prepared, Prepared)
    sides = Side("drafted (green: accepted)"), Side("plain")
    applied: Applied | None = None

    def view() -> Table:
        table = Table.grid(expand=True)
        table.add_row(*(side.render() for side in sides))
        return table

    with Live(view(), console=console, auto_refresh=False) as live:
        for side, runner in zip(sides, (engine, plain), strict=True):
            first: float | None = None
            shown = 0.0
            for output in runner.stream(prepared.request):
                now = time.perf_counter()
                first = now if first is None else first
                decode = [engine.tokenizer.decode([token]) for token in output.tokens]
                side.add(output, decode, now - first)
                if now - shown > 0.5:  # drawing takes CPU time from decoding
                    live.update(view(), refresh=True)
                    shown = now
                if side is sides[1] and now - first > _PLAIN_LIMIT:
                    break
            live.update(view(), refresh=True)
            if applied is None and side.usage is not None:
                text = "".join(piece for piece, _ in side.pieces)
                applied = prepared.conclude(text, side.usage, side.finish is FinishReason.LENGTH)
    assert applied is not None
    return sides[0], sides[1], applied


def conclude(console: Console, edit: dict[str, str], applied: Applied, drafted: Side, undrafted: Side) -> None:
    console.print("\nThe merge, as a diff:")
    console.print(Syntax(applied.diff(), "diff", theme="ansi_dark", background_color="default"))
    assert drafted.usage is not None
    table = Table("", "tokens", "steps", "seconds", "tokens/s")
    for name, side in (("drafted", drafted), ("plain", undrafted)):
        steps = side.usage.steps if side.usage else 0
        table.add_row(name, str(side.tokens), str(steps), f"{side.seconds:.2f}", f"{side.rate:.1f}")
    console.print(table)
    if undrafted.rate and drafted.rate:
        one, other = ([piece for piece, _ in side.pieces] for side in (drafted, undrafted))
        same = one[: len(other)] == other
        console.print(f"Drafted decoding was {drafted.rate / undrafted.rate:.1f} times as fast.")
        console.print("The tokens are the same." if same else "[yellow]The tokens differ: a tie in bf16.[/]")
        if len(other) < len(one):
            console.print(f"(Plain decoding was stopped after {_PLAIN_LIMIT:.0f} s.)")
    for reason in applied.reasons:
        console.print(f"[yellow]flagged:[/] {reason}", highlight=False)
    equal = applied.text == edit["after"]
    console.print(
        "[green]The result equals the commit.[/]" if equal else "[yellow]The result is not the commit's text.[/]"
    )


if __name__ == "__main__":
    main()
