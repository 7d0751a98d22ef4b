"""Clients' settings files: merges values into an existing file and keeps a backup copy of the old one."""

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
    """Values for a client's settings file. YAML and env files have one level of strings; JSON and TOML nested tables."""

    path: Path
    format: Format
    values: Values

    def text(self, before: str = "") -> str:
        """The text `before` with the values merged in, otherwise unchanged. Raises InputError if it cannot be merged into."""
        try:
            return _MERGES[self.format](before, self.values)
        except ValueError as error:
            raise InputError(f"{self.path} cannot be changed ({error}); add this by hand:\n{self.text()}") from error

    def write(self) -> tuple[bool, Path | None]:
        """Merges the values into the file. Returns (whether it changed, the backup copy or None if there was no file)."""
        before = read_text(str(self.path)) if self.path.exists() else ""
        after = self.text(before)
        if after == before:
            return False, None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        copy = _keep_copy(self.path) if self.path.exists() else None
        write_text(self.path, after)
        return True, copy


def _keep_copy(path: Path) -> Path:
    """Copies the file to `NAME.bak`, or with the first free number appended, with the file's permissions."""
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
    """Merges into JSON and keeps the indentation. Raises ValueError for comments, which JSON does not have."""
    data = json.loads(before) if before.strip() else {}
    _update(data, values)
    indent = re.search(r"\n([ \t]+)\S", before)
    return json.dumps(data, indent=indent[1] if indent else 2, ensure_ascii=False) + "\n"


def _merge_toml(before: str, values: Values) -> str:
    """Merges into TOML. Keeps comments and order, and every byte of the parts that do not change.

    New top-level keys are put before everything, since a table must not precede them, and new tables at the end. If the
    result does not parse as expected (for example within an inline table), tomlkit chooses the position.
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
    raise ValueError("its tables are written in a form that cannot be added to safely")


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
    """(values whose keys exist already, new values that are not tables, new tables), two levels deep."""
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
    """Sets the values in `data`, table by table. Raises ValueError if one side has a table and the other has not."""
    if not isinstance(data, dict):
        raise ValueError("there is a value where a table is expected")
    for key, value in values.items():
        if isinstance(value, Mapping) and key in data:
            _update(data[key], value)
        elif isinstance(data.get(key), dict):
            raise ValueError(f"{key} is a table in the file")
        elif data.get(key) != value:
            data[key] = value


def _merge_yaml(before: str, values: Values) -> str:
    """Merges into YAML: replaces the value of each key (of the last one, if a key is repeated) or adds it at the end."""
    try:
        root = yaml.compose(before, Loader=yaml.SafeLoader)
        if root is not None and (not isinstance(root, yaml.MappingNode) or root.flow_style):
            raise ValueError("it is not a block mapping of keys and values")
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
            raise ValueError("it is written in a form that cannot be changed safely")
    except yaml.YAMLError as error:
        raise ValueError(f"it is not a YAML document of plain values: {' '.join(str(error).split())}") from error
    return after


def _yaml_edit(text: str, key: Any, value: Any, written: str) -> tuple[int, int, str]:
    """(start, end, replacement) of an edit: of the value if it is on its key's line, else of everything after the key."""
    last = value
    while isinstance(last, yaml.CollectionNode) and not last.flow_style and last.value:
        last = last.value[-1] if isinstance(last, yaml.SequenceNode) else last.value[-1][1]
    start, end = value.start_mark.index, last.end_mark.index
    if start < key.end_mark.index or end < start:  # an alias, whose value is elsewhere
        raise ValueError(f"the value of {key.value} is a reference")
    end = start + len(text[start:end].rstrip())
    if "\n" not in text[key.end_mark.index : end] and end > start:
        return start, end, written
    return key.end_mark.index, max(end, start), f": {written}"


# a statement of a .env file as python-dotenv parses it; a quoted value may span lines
_STATEMENT = re.compile(
    r"""[^\S\r\n]*(?:
        (?:export[^\S\r\n]+)?(?P<key>'[^']+'|[^=\#\s'"]+)[^\S\r\n]*
        (?:=[^\S\r\n]*(?P<value>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|(?!['"])[^\r\n]*))?
    )?[^\S\r\n]*(?:\#[^\r\n]*)?(?:\r\n|\n|\r|\Z)""",
    re.VERBOSE | re.DOTALL,
)


def _statements(text: str) -> Iterator[re.Match[str]]:
    """Yields the statements of a .env file. Raises ValueError for a line that is not a statement, comment or empty."""
    place = 0
    while place < len(text):
        found = _STATEMENT.match(text, place)
        if found is None:
            raise ValueError(f"its line {text.count(chr(10), 0, place) + 1} cannot be read")
        yield found
        place = found.end()


def _merge_env(before: str, values: Values) -> str:
    """Merges into a .env file, as `_merge_yaml` does."""
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
    """The text, with a final newline if something is added after it."""
    return text + _end_of_line(text) if added and text and not text.endswith(("\n", "\r")) else text


_MERGES: dict[Format, Callable[[str, Values], str]] = {
    "json": _merge_json,
    "toml": _merge_toml,
    "yaml": _merge_yaml,
    "env": _merge_env,
}
