"""Clients' settings files: values merged into what stands there, with a copy of the old file kept beside it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from paceline.errors import ConfigError, InputError
from paceline.tasks.files import read_text, write_text

Values = Mapping[str, Any]
Format = Literal["json", "toml", "yaml", "env"]


@dataclass(frozen=True)
class SettingsFile:
    """Values that a client reads from a file. YAML and env files hold one level of strings, the others tables in tables."""

    path: Path
    format: Format
    values: Values

    def text(self, before: str = "") -> str:
        """The file's text with the values in it, all else as it was. Raises InputError where `before` cannot be read."""
        try:
            return _MERGES[self.format](before, self.values)
        except ValueError as error:
            raise InputError(f"{self.path} cannot be changed ({error}); add this by hand:\n{self.text()}") from error

    def write(self) -> tuple[bool, Path | None]:
        """Merges the values in at once. (whether anything changed, the copy of the old file or None where none was)."""
        before = read_text(str(self.path)) if self.path.exists() else ""
        after = self.text(before)
        if after == before:
            return False, None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        copy = _keep_copy(self.path) if self.path.exists() else None
        write_text(self.path, after)
        return True, copy


def _keep_copy(path: Path) -> Path:
    """A copy named `NAME.bak`, or with the first free number after it; as private as the file."""
    number = 0
    while True:
        copy = path.with_name(f"{path.name}.bak" + (f".{number}" if number else ""))
        try:
            handle = os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_EXCL, path.stat().st_mode & 0o777)
        except FileExistsError:
            number += 1
            continue
        except OSError as error:
            raise InputError(f"cannot write {copy}: {error.strerror}") from error
        with os.fdopen(handle, "wb") as file:
            file.write(path.read_bytes())
        return copy


def _merge_json(before: str, values: Values) -> str:
    """The indentation is kept; comments are no JSON and are refused."""
    data = json.loads(before) if before.strip() else {}
    _update(data, values)
    indent = re.search(r"\n([ \t]+)\S", before)
    return json.dumps(data, indent=indent[1] if indent else 2, ensure_ascii=False) + "\n"


def _merge_toml(before: str, values: Values) -> str:
    """Comments and order are kept."""
    try:
        import tomlkit
    except ModuleNotFoundError as error:
        raise ConfigError("this needs tomlkit: pip install 'paceline[serve]'") from error
    document = tomlkit.parse(before)
    _update(document, values)
    return tomlkit.dumps(document)


def _update(data: Any, values: Values) -> None:
    """Sets the values in `data`, table by table. Raises ValueError where something else stands in a table's place."""
    if not isinstance(data, dict):
        raise ValueError("what should be a table is something else")
    for key, value in values.items():
        if isinstance(value, Mapping) and key in data:
            _update(data[key], value)
        elif data.get(key) != value:
            data[key] = value


def _merge_lines(before: str, values: Values, pattern: str, write: Callable[[str, str], str]) -> str:
    """Puts each value's line where its key stands (the last, where it does twice), or at the end."""
    lines = before.splitlines()
    for key, value in values.items():
        places = [place for place, line in enumerate(lines) if re.match(pattern.format(re.escape(key)), line)]
        line = write(key, value)
        if places:
            lines[places[-1]] = line
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"


def _merge_yaml(before: str, values: Values) -> str:
    return _merge_lines(before, values, r"{}\s*:(\s|$)", lambda key, value: f"{key}: {json.dumps(value)}")


def _merge_env(before: str, values: Values) -> str:
    def line(key: str, value: str) -> str:
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"{key}='{escaped}'"

    return _merge_lines(before, values, r"\s*(export\s+)?{}\s*=", line)


_MERGES: dict[Format, Callable[[str, Values], str]] = {
    "json": _merge_json,
    "toml": _merge_toml,
    "yaml": _merge_yaml,
    "env": _merge_env,
}
