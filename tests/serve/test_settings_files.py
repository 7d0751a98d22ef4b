"""Merging values into settings files of many forms: they are read back, all else is unchanged, or the file is refused."""

from __future__ import annotations

import difflib
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from paceline.errors import InputError
from paceline.serve.connect import Server, find_client
from paceline.serve.settings_files import SettingsFile

SERVER = Server("http://127.0.0.1:9", "owner/model", 32_768, "a 'key'")
CODEX = find_client("codex").settings(SERVER, {"HOME": "/home"}).files[0]
AIDER = find_client("aider").settings(SERVER, {"HOME": "/home"}).files[0]
MINI = find_client("mini").settings(SERVER, {"HOME": "/home"}).files[0]


def gone(before: str, after: str) -> str:
    """The lines of `before` that are missing in `after`."""
    lines = difflib.ndiff(before.splitlines(keepends=True), after.splitlines(keepends=True))
    return "".join(line[2:] for line in lines if line.startswith("-"))


def merged(into: dict[str, Any], values: Any) -> dict[str, Any]:
    for key, value in values.items():
        into[key] = merged(into.get(key, {}), value) if isinstance(value, dict) else value
    return into


@pytest.mark.parametrize(
    ("before", "changed"),
    [
        ("", ""),
        ('[tui]\ntheme = "dark"', 'theme = "dark"'),
        ("# about the whole\n\n[tui]\na = 1 # so\n\n# about b\n[b]\n# the end\n", ""),
        ('tui.theme = "dark"\n', ""),
        ("[tui]\nnotifications.x = 1\n", ""),
        ('model_providers.mine.base_url = "x"\nmodel_providers.mine.name = "y"\n\n[tui]\na=1\n', ""),
        ('model_providers.paceline.name = "x"\n[tui]\na=1\n', 'model_providers.paceline.name = "x"\n'),
        ('[model_providers.mine]\nname = "m"\n[tui]\nx=1\n[model_providers.other]\nname = "o"\n', ""),
        ('[tui]\nx=1\n[model_providers.paceline]\nname="o" # mine\n[z]\ny=1\n', 'name="o" # mine\n'),
        ('model_providers = {mine = {name = "x"}}\n[t]\na=1\n', 'model_providers = {mine = {name = "x"}}\n'),
        ("[[projects]]\na=1\n[[projects]]\na=2\n", ""),
        ("[[model_providers.mine]]\na = 1\n[[p]]\nb = 2\n[[model_providers.mine]]\n", ""),
        ('[profiles.x]\nmodel = "p"\nmodel_provider = "q"\n', ""),
        ('"model" = "x"\n[t]\nmodel = "t"\n', '"model" = "x"\n'),
        ('notes = """\n[model]\nmodel = "no"\n"""\n[t]\nmodel = "t"\n', ""),
        ('a = "\\u2028\x85"\r\n[t]\r\nb = 2\r\n', ""),
        ("[model_providers]\n", ""),
    ],
)
def test_toml_values_are_read_where_they_belong_and_all_else_stays(before: str, changed: str) -> None:
    after = CODEX.text(before)
    assert tomllib.loads(after) == merged(tomllib.loads(before), CODEX.values)
    assert gone(before, after) == changed
    assert CODEX.text(after) == after
    assert ("\r\n" in before) is ("\r\n" in after) and ("\r\n" not in after or not re.search("[^\r]\n", after))


@pytest.mark.parametrize(
    "before", ["[model]\na = 1\n", "model_providers = 3\n", "a = \n", "model_providers.paceline = 1\n"]
)
def test_toml_that_cannot_be_merged_is_refused(before: str) -> None:
    with pytest.raises(InputError, match="by hand"):
        CODEX.text(before)


@pytest.mark.parametrize(
    ("before", "changed"),
    [
        ("", ""),
        ("# mine\n", ""),
        ("---\n# mine\ndark-mode: true", "dark-mode: true"),
        ("model: other  # the one I like\nread: [a, b]\n", "model: other  # the one I like\n"),
        ("notes: |\n  model: no\n  openai-api-key: no\n\n# b\nb: 1\n", ""),
        ("model: |\n  one\n  two\n\n# b\nb: 1\n", "model: |\n  one\n  two\n"),
        ("model:\n- a\n- b # last\n# b\nb: 1\n", "model:\n- a\n- b # last\n"),
        (
            "model:\n  in:\n    - a\n    - {b: c,\n       d: e}\nb: 1\n",
            "model:\n  in:\n    - a\n    - {b: c,\n       d: e}\n",
        ),
        ("model: one\n  and two\nb:\n  model: inner\n", "model: one\n  and two\n"),
        ("model: >-\n    a\n\n    b\nb: 1", "model: >-\n    a\n\n    b\nb: 1"),
        ("model:\nb: 1\n", "model:\n"),
        ("model: first\nmodel: second\n", "model: second\n"),
        ('"model": "x\n  y"  # c\nb: 2\n', '"model": "x\n  y"  # c\n'),
        ("  a: 1\n  model: b\n", "  model: b\n"),
        ("a: 1\r\nmodel: b\r\n", "model: b\r\n"),
        ("base: &b {x: 1}\nother:\n  <<: *b\n", ""),
        ("a: 'x\u2028model: no\x85model: no'\n", ""),
    ],
)
def test_yaml_values_are_replaced_whole_and_all_else_stays(before: str, changed: str) -> None:
    after = AIDER.text(before)
    assert yaml.safe_load(after) == {**(yaml.safe_load(before) or {}), **AIDER.values}
    lost = gone(before, after)
    assert re.sub(r"\s+$", "", lost) == re.sub(r"\s+$", "", changed), after
    assert AIDER.text(after) == after
    for comment in re.findall("# (?:mine|b|c|the one I like|last)\n", before):
        assert comment in after


@pytest.mark.parametrize(
    "before",
    [
        "- a\n",
        "just text\n",
        "{model: a}\n",
        "a: 1\n---\nb: 2\n",
        "a: 1\n...\n",
        "x: &m one\nmodel: *m\n",
        "model: &m one\nx: *m\n",
        "x: !own 3\n",
        "a: [\n",
        "? [a, b]\n: c\n",
        "a: |+\n  text\n\n\n",
        "a: \x01\n",
    ],
)
def test_yaml_that_cannot_be_merged_safely_is_refused_and_stays(before: str, tmp_path: Path) -> None:
    path = tmp_path / "conf.yml"
    path.write_text(before, newline="")
    file = SettingsFile(path, "yaml", AIDER.values)
    try:
        file.write()
    except InputError as error:
        assert "by hand" in str(error) and "\n" not in str(error).partition("; add")[0]
        assert path.read_text() == before and list(tmp_path.iterdir()) == [path]
    else:
        assert yaml.safe_load(path.read_text()) == {**yaml.safe_load(before), **AIDER.values}
        assert before.startswith("a: |+"), "all others are refused"


@pytest.mark.parametrize(
    ("before", "changed"),
    [
        ("", ""),
        ("# OPENAI_API_KEY=no\nOTHER=1", "OTHER=1"),
        ("export OPENAI_API_KEY=old # why\nOTHER=1\n", "export OPENAI_API_KEY=old # why\n"),
        ("NOTE='one\nOPENAI_API_KEY=no\nthree'\nOTHER=1\n", ""),
        ('OPENAI_API_KEY="one\n# two\nthree" # why\nOTHER=1\n', 'OPENAI_API_KEY="one\n# two\nthree" # why\n'),
        ("OPENAI_API_KEY\nOTHER=1\n", "OPENAI_API_KEY\n"),
        ("OPENAI_API_KEY=\r\nOTHER = it's\r\n", "OPENAI_API_KEY=\r\n"),
        ("A=x\x0bOPENAI_API_KEY=no\nB=x\u2028OPENAI_API_KEY=no\nC=x\x85y\n", ""),
        ("OPENAI_API_KEY=first\nOPENAI_API_KEY=second\n", "OPENAI_API_KEY=second\n"),
    ],
)
def test_env_values_are_replaced_whole_and_all_else_stays(before: str, changed: str) -> None:
    after = MINI.text(before)
    lines = difflib.ndiff(re.split("(?<=\n)", before), re.split("(?<=\n)", after))
    assert "".join(line[2:] for line in lines if line.startswith("- ")) == changed
    assert MINI.text(after) == after and ("\r\n" in before) is ("\r\n" in after)
    for comment in re.findall("# why", before):
        assert comment in after or "=old" in before


def test_a_shell_reads_the_env_files_plain_values(tmp_path: Path) -> None:
    file = SettingsFile(tmp_path / "env", "env", {"A": "x y", "B": "http://h:1/v1"})
    file.path.write_text('B="one\ntwo" # why\nC=3\n')
    file.write()
    script = f'. {shlex.quote(str(file.path))}; printf "%s|%s|%s" "$A" "$B" "$C"'
    assert subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout == (
        "x y|http://h:1/v1|3"
    )


@pytest.mark.parametrize("before", ["A='open\nB=1\n", 'A="x" y\n', "a key = 1\n", "=1\n"])
def test_env_that_cannot_be_read_is_refused(before: str) -> None:
    with pytest.raises(InputError, match=r"line 1 .*by hand"):
        MINI.text(before)
