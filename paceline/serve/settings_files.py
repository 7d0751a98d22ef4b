"""Clients' settings files: values merged into what stands there, with a copy of the old file kept beside it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml  # type: ignore[import-untyped]  # comes with transformers

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
    """Comments, order and, where nothing of it changes, every byte are kept.

    Keys that are not there yet come before everything, which no table can be, and tables after everything. Where that does
    not read as it should (within an inline table, say), tomlkit finds the place.
    """
    try:
        import tomlkit
    except ModuleNotFoundError as error:
        raise ConfigError("this needs tomlkit: pip install 'paceline[serve]'") from error
    wanted = tomllib.loads(before)
    _update(wanted, values)
    if wanted == tomllib.loads(before):
        return before
    for merge in (_added_around, _added_within):
        with contextlib.suppress(tomllib.TOMLDecodeError, tomlkit.exceptions.TOMLKitError):
            after = merge(before, values)
            if tomllib.loads(after) == wanted:
                return after
    raise ValueError("it writes its tables in a way that nothing can be added to safely")


def _added_within(before: str, values: Values) -> str:
    import tomlkit

    document = tomlkit.parse(before)
    _update(document, values)
    return tomlkit.dumps(document)


def _added_around(before: str, values: Values) -> str:
    import tomlkit

    there, top, tables = _parted(tomlkit.parse(before), values)
    middle, end = _added_within(before, there) if there else before, _end_of_line(before)
    first, last = (tomlkit.dumps(each).replace("\n", end) for each in (top, tables))
    first += end if first and middle.startswith("[") else ""
    middle = _with_end(middle, last)
    return first + middle + (end if last and first + middle else "") + last


def _parted(document: Values, values: Values) -> tuple[Values, Values, Values]:
    """The values whose keys are there already, other values that are no tables, and other tables, two levels deep."""
    there: dict[str, Any] = {}
    top: dict[str, Any] = {}
    tables: dict[str, Any] = {}
    for key, value in values.items():
        if not isinstance(value, Mapping):
            (there if key in document else top)[key] = value
            continue
        for name, inner in value.items():
            known = isinstance(document.get(key), Mapping) and name in document[key]
            (there if known else tables).setdefault(key, {})[name] = inner
    return there, top, tables


def _update(data: Any, values: Values) -> None:
    """Sets the values in `data`, table by table. Raises ValueError where a table and something else stand for each other."""
    if not isinstance(data, dict):
        raise ValueError("what should be a table is something else")
    for key, value in values.items():
        if isinstance(value, Mapping) and key in data:
            _update(data[key], value)
        elif isinstance(data.get(key), dict):
            raise ValueError(f"{key} is a table there")
        elif data.get(key) != value:
            data[key] = value


def _merge_yaml(before: str, values: Values) -> str:
    """Replaces each key's whole value where the key stands (the last, where it does twice), or adds it at the end."""
    try:
        root = yaml.compose(before, Loader=yaml.SafeLoader)
        if root is not None and (not isinstance(root, yaml.MappingNode) or root.flow_style):
            raise ValueError("it is no list of keys with values")
        pairs = (
            {key.value: (key, value) for key, value in root.value if isinstance(key, yaml.ScalarNode)}
            if root is not None
            else {}
        )
        edits: list[tuple[int, int, str]] = []
        indent = " " * root.start_mark.column if root is not None else ""
        added = ""
        for key, value in values.items():
            written = json.dumps(value, ensure_ascii=False)
            if key in pairs:
                edits.append(_yaml_edit(before, *pairs[key], written))
            else:
                added += f"{indent}{key}: {written}{_end_of_line(before)}"
        after = before
        for start, end, text in sorted(edits, reverse=True):
            after = after[:start] + text + after[end:]
        after = _with_end(after, added) + added
        if yaml.safe_load(after) != {**(yaml.safe_load(before) or {}), **values}:
            raise ValueError("it is written in a way that cannot be changed safely")
    except yaml.YAMLError as error:
        raise ValueError(f"it is no YAML of one document and plain values: {' '.join(str(error).split())}") from error
    return after


def _yaml_edit(text: str, key: Any, value: Any, written: str) -> tuple[int, int, str]:
    """The start and end of what is to be replaced, and by what: a value on its key's line alone, another from the key on."""
    last = value
    while isinstance(last, yaml.CollectionNode) and not last.flow_style and last.value:
        last = last.value[-1] if isinstance(last, yaml.SequenceNode) else last.value[-1][1]
    start, end = value.start_mark.index, last.end_mark.index
    if start < key.end_mark.index or end < start:  # a reference to what stands elsewhere
        raise ValueError(f"the value of {key.value} is a reference")
    end = start + len(text[start:end].rstrip())
    if "\n" not in text[key.end_mark.index : end] and end > start:
        return start, end, written
    return key.end_mark.index, max(end, start), f": {written}"


# a statement of a .env file, as python-dotenv reads it; a quoted value may have many lines
_STATEMENT = re.compile(
    r"""[^\S\r\n]*(?:
        (?:export[^\S\r\n]+)?(?P<key>'[^']+'|[^=\#\s'"]+)[^\S\r\n]*
        (?:=[^\S\r\n]*(?P<value>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|(?!['"])[^\r\n]*))?
    )?[^\S\r\n]*(?:\#[^\r\n]*)?(?:\r\n|\n|\r|\Z)""",
    re.VERBOSE | re.DOTALL,
)


def _statements(text: str) -> Iterator[re.Match[str]]:
    """Raises ValueError at what is no statement, comment or empty line."""
    place = 0
    while place < len(text):
        found = _STATEMENT.match(text, place)
        if found is None:
            raise ValueError(f"its line {text.count(chr(10), 0, place) + 1} cannot be read")
        yield found
        place = found.end()


def _merge_env(before: str, values: Values) -> str:
    """As with YAML."""
    places = {found["key"].strip("'"): found for found in _statements(before) if found["key"]}
    edits, added = [], ""
    for key, value in values.items():
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        if key in places:
            found = places[key]
            start, end = found.span("value") if found["value"] is not None else (found.end("key"),) * 2
            edits.append((start, end, f"'{escaped}'" if found["value"] is not None else f"='{escaped}'"))
        else:
            added += f"{key}='{escaped}'{_end_of_line(before)}"
    after = before
    for start, end, text in sorted(edits, reverse=True):
        after = after[:start] + text + after[end:]
    return _with_end(after, added) + added


def _end_of_line(text: str) -> str:
    return "\r\n" if "\r\n" in text else "\n"


def _with_end(text: str, added: str) -> str:
    """The text, with the end of its last line where something is added behind it."""
    return text + _end_of_line(text) if added and text and not text.endswith(("\n", "\r")) else text


_MERGES: dict[Format, Callable[[str, Values], str]] = {
    "json": _merge_json,
    "toml": _merge_toml,
    "yaml": _merge_yaml,
    "env": _merge_env,
}
