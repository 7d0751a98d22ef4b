"""Recorded requests of an agent, made small: the structure is unchanged, long texts are replaced by short ones."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

LONGEST = 80  # characters; longer texts are replaced
_IDENTITY = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_WRAPPED = re.compile(r"^\s*<([a-zA-Z_-]+)>")
_TASK = re.compile(r"EDIT .*")  # the test's own task, which is kept


class Shortener:
    """Replaces long texts (equal ones by equal ones), the session's folder, and every UUID."""

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)
        self._texts: dict[str, str] = {}
        self._identities: dict[str, str] = {}

    def __call__(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._named(key, each) for key, each in value.items()}
        if isinstance(value, list):
            return [self(each) for each in value]
        return self._text(value) if isinstance(value, str) else value

    def _named(self, key: str, value: Any) -> Any:
        """The value under a key. Descriptions of tools and parameters are replaced whatever their length."""
        if key == "description" and isinstance(value, str) and value:
            return self._replaced(value)
        return self(value)

    def _text(self, text: str) -> str:
        text = _IDENTITY.sub(self._identity, text.replace(self._folder, ""))
        return text if len(text) <= LONGEST else self._replaced(text)

    def _replaced(self, text: str) -> str:
        if text not in self._texts:
            short = f"Text {len(self._texts) + 1}, in place of {len(text)} characters."
            tag, task = _WRAPPED.match(text), _TASK.search(text)
            self._texts[text] = f"<{tag[1]}>\n{short}\n</{tag[1]}>" if tag else short
            self._texts[text] += f"\n{task[0]}" if task else ""
        return self._texts[text]

    def _identity(self, found: re.Match[str]) -> str:
        return self._identities.setdefault(found[0], f"00000000-0000-4000-8000-{len(self._identities) + 1:012}")


def write_fixture(file: Path, path: str, requests: list[dict[str, Any]], folder: Path) -> None:
    """Writes the bodies sent to `path`, without side requests (titles and the like): the first whole, then changed keys."""
    shorten = Shortener(folder)
    bodies = [shorten(each["body"]) for each in requests if each["path"] == path]
    if any("tools" in body for body in bodies):
        bodies = [body for body in bodies if "tools" in body]
    turns = bodies[:1]
    for before, body in itertools.pairwise(bodies):
        if before.keys() - body.keys():
            raise ValueError(
                f"a later request lacks {sorted(before.keys() - body.keys())}, which this form cannot express"
            )
        turns.append({key: value for key, value in body.items() if before.get(key) != value})
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"path": path, "turns": turns}, indent=1, ensure_ascii=False) + "\n")


def read_fixture(file: Path) -> tuple[str, list[dict[str, Any]]]:
    """(the path, the whole body of each turn)."""
    data = json.loads(file.read_text())
    bodies: list[dict[str, Any]] = []
    for turn in data["turns"]:
        bodies.append({**(bodies[-1] if bodies else {}), **turn})
    return data["path"], bodies
