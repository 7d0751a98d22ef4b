"""`paceline connect` and `paceline run`: real files, a real server, and programs in the place of a client."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from typer.testing import CliRunner, Result

from paceline.cli import app
from paceline.errors import ConfigError, InputError, Offline, PacelineError, ServeError, Unauthorized, UnknownModel
from paceline.serve.connect import CLIENTS, Server, find_client, find_server
from paceline.serve.settings_files import SettingsFile
from tests.serve.service import running, tiny_service, until

KEY = 'a key\'s "name"'
SERVER = Server("http://127.0.0.1:9", "owner/model", 32_768, KEY)
CODEX = """\
# my own settings
model = "other"   # the one I like

[model_providers.paceline]
base_url = "http://old/v1"
# how patient to be
request_max_retries = 2

[tui]
theme = "dark"
"""

START = """
import os, sys
from paceline.serve.connect import find_client, find_server, start
start(find_client(sys.argv[1]), find_server(sys.argv[2], None, "secret"), sys.argv[3:], os.environ)
"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with running(tiny_service(keys=("secret",))) as url:
        yield url


def environment(home: Path, **more: str) -> dict[str, str]:
    return {"HOME": str(home), "PATH": os.environ["PATH"], "PYTHONPATH": os.getcwd(), **more}


def paceline(home: Path, *arguments: str, **more: str) -> Result:
    """Runs the command in this process. Only a command that becomes a client needs its own."""
    return CliRunner().invoke(app, arguments, env=environment(home, **more), catch_exceptions=True)


def file_of(client: str, home: Path, index: int = 0) -> SettingsFile:
    return find_client(client).settings(SERVER, {"HOME": str(home)}).files[index]


def test_a_server_says_what_it_serves(address: str) -> None:
    context = httpx.get(f"{address}/v1/models", headers={"x-api-key": "secret"}).json()["data"][0]["max_model_len"]
    assert find_server(f"{address}/v1/", None, "secret") == Server(address, "tiny", context, "secret")
    assert find_server(address, "other-name", "secret").model == "other-name"
    with pytest.raises(Unauthorized, match="--api-key"):
        find_server(address)
    with pytest.raises(UnknownModel, match="tiny, other-name"):
        find_server(address, "gpt", "secret")
    with pytest.raises(ServeError, match="does not answer like a model server"):
        find_server(f"{address}/health", None, "secret")


def test_without_a_server_the_model_must_be_named() -> None:
    with pytest.raises(Offline, match="--model"):
        find_server("http://127.0.0.1:9")
    assert find_server("http://127.0.0.1:9", "named") == Server("http://127.0.0.1:9", "named")
    with pytest.raises(ConfigError):
        find_server("nonsense://x", "named")


def test_what_is_printed_can_be_given_to_a_shell(tmp_path: Path) -> None:
    shown = find_client("claude").settings(SERVER, {"HOME": str(tmp_path)}).shown()
    done = subprocess.run(
        ["sh", "-c", f"{shown}\nenv"], capture_output=True, text=True, env={"ANTHROPIC_API_KEY": "mine"}, check=True
    )
    variables = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert "ANTHROPIC_API_KEY" not in variables
    assert variables["ANTHROPIC_BASE_URL"] == SERVER.url and variables["ANTHROPIC_AUTH_TOKEN"] == KEY
    assert variables["ANTHROPIC_MODEL"] == variables["ANTHROPIC_DEFAULT_HAIKU_MODEL"] == SERVER.model
    assert variables["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] == "32768"
    assert variables["CLAUDE_CODE_ATTRIBUTION_HEADER"] == "0"
    assert variables["CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC"] == "1"


def test_claude_codes_window_is_set_only_if_it_is_large_enough() -> None:
    """Claude Code raises an auto-compact window below 100,000 to 100,000, which is more than such a server has."""
    for context, given in ((32_768, False), (200_000, True)):
        variables = find_client("claude").settings(Server("http://x", "m", context), {}).environment
        assert ("CLAUDE_CODE_AUTO_COMPACT_WINDOW" in variables) is given
        assert int(variables["CLAUDE_CODE_MAX_OUTPUT_TOKENS"]) <= context // 4
    assert (
        "CLAUDE_CODE_MAX_CONTEXT_TOKENS" not in find_client("claude").settings(Server("http://x", "m"), {}).environment
    )


def test_codex_keeps_comments_and_other_keys(tmp_path: Path) -> None:
    file = file_of("codex", tmp_path)
    text = file.text(CODEX)
    wanted = tomllib.loads(CODEX)
    wanted |= {"model": "owner/model", "model_provider": "paceline", "model_context_window": 32_768}
    provider = {
        "name": "Paceline",
        "base_url": f"{SERVER.url}/v1",
        "wire_api": "responses",
        "env_key": "PACELINE_API_KEY",
    }
    wanted["model_providers"]["paceline"] |= provider
    assert tomllib.loads(text) == wanted
    assert "# my own settings" in text and "# the one I like" in text and "# how patient to be" in text
    assert tomllib.loads(file.text()) == {**file.values}
    assert file.text(text) == text


def test_codexs_arguments_say_what_its_file_says(tmp_path: Path) -> None:
    settings = find_client("codex").settings(SERVER, {"HOME": str(tmp_path)})
    pairs = settings.arguments[1::2]
    assert set(settings.arguments[::2]) == {"-c"}
    assert tomllib.loads("\n".join(pairs)) == settings.files[0].values
    assert settings.environment == settings.exported == {"PACELINE_API_KEY": KEY}


@pytest.mark.parametrize("client", ["claude", "opencode"])
def test_json_files_keep_other_keys(client: str, tmp_path: Path) -> None:
    file = file_of(client, tmp_path)
    before = {"theme": "é", "env": {"MINE": "1"}, "provider": {"mine": {"models": {}}}}
    text = file.text(json.dumps(before, indent=4))
    after = json.loads(text)
    assert after["theme"] == "é" and after["env"]["MINE"] == "1" and after["provider"]["mine"] == {"models": {}}
    assert text.startswith('{\n    "theme": "é"') and file.text(text) == text
    values = after["env"] if client == "claude" else after["provider"]["paceline"]["options"]
    assert SERVER.url in json.dumps(values)
    for unreadable in ('{// a comment\n"a": 1}', "[1]", '{"env": 3, "provider": []}'):
        with pytest.raises(InputError, match="by hand"):
            file.text(unreadable)


def test_aiders_files_keep_comments(tmp_path: Path) -> None:
    options, metadata = file_of("aider", tmp_path), file_of("aider", tmp_path, 1)
    text = options.text("# mine\nmodel: other\ndark-mode: true\nmodel-settings-file: x.yml")
    assert yaml.safe_load(text) == {**options.values, "dark-mode": True, "model-settings-file": "x.yml"}
    assert text.startswith("# mine\nmodel: ") and options.text(text) == text
    facts = json.loads(metadata.text())["openai/owner/model"]
    assert facts["max_input_tokens"] == 32_768 and facts["max_output_tokens"] == 8192


def test_minis_file_is_read_by_a_shell_too(tmp_path: Path) -> None:
    file = file_of("mini", tmp_path)
    text = file.text("# mine\nexport OPENAI_API_KEY=old\nOTHER=1\n")
    assert text.count("OPENAI_API_KEY") == 1 and "# mine\n" in text and "OTHER=1\n" in text
    assert file.text(text) == text
    assert file.path == tmp_path / ".config/mini-swe-agent/.env" or sys.platform == "darwin"


def test_folders_that_the_user_moved_are_found(tmp_path: Path) -> None:
    moved = {name: str(tmp_path / name) for name in ("CLAUDE_CONFIG_DIR", "CODEX_HOME", "MSWEA_GLOBAL_CONFIG_DIR")}
    for client, name in (("claude", "CLAUDE_CONFIG_DIR"), ("codex", "CODEX_HOME"), ("mini", "MSWEA_GLOBAL_CONFIG_DIR")):
        assert find_client(client).settings(SERVER, moved).files[0].path.parent == tmp_path / name
    there = tmp_path / ".config/opencode/opencode.jsonc"
    there.parent.mkdir(parents=True)
    there.write_text("{}")
    assert file_of("opencode", tmp_path).path == there


def test_writing_keeps_every_old_file_its_mode_and_a_link(tmp_path: Path) -> None:
    real, link = tmp_path / "real.json", tmp_path / "linked.json"
    real.write_text('{"a": 1}')
    real.chmod(0o640)
    link.symlink_to(real)
    for number in (1, 2):
        changed, copy = SettingsFile(link, "json", {"b": number}).write()
        assert changed and copy is not None and copy.stat().st_mode & 0o777 == 0o640
    assert SettingsFile(link, "json", {"b": 2}).write() == (False, None)
    assert (
        json.loads(real.read_text()) == {"a": 1, "b": 2} and link.is_symlink() and real.stat().st_mode & 0o777 == 0o640
    )
    assert json.loads((tmp_path / "linked.json.bak").read_text()) == {"a": 1}
    assert json.loads((tmp_path / "linked.json.bak.1").read_text()) == {"a": 1, "b": 1}
    assert len(list(tmp_path.iterdir())) == 4
    new = tmp_path / "deep/er/new.json"
    assert SettingsFile(new, "json", {"b": 2}).write() == (True, None)
    assert new.stat().st_mode & 0o777 == 0o600  # the file may contain a key


def test_connect_writes_and_says_so(address: str, tmp_path: Path) -> None:
    options = ("codex", "--url", address, "--api-key", "secret")
    shown = paceline(tmp_path, "connect", *options)
    assert shown.exit_code == 0 and "export PACELINE_API_KEY=secret" in shown.stdout
    assert f"# {tmp_path}/.codex/config.toml" in shown.stdout and not (tmp_path / ".codex").exists()
    done = paceline(tmp_path, "connect", *options, "--write")
    file = tmp_path / ".codex/config.toml"
    assert f"wrote {file}\n" in done.stdout and "export PACELINE_API_KEY=secret" in done.stdout
    assert file.read_text().strip() in shown.stdout and "secret" not in file.read_text()
    again = paceline(tmp_path, "connect", *options, "--write", "--model", "other-name")
    assert f"the old one is {file}.bak" in again.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("connect", "emacs"), "mini-swe-agent"),
        (("connect", "claude", "--url", "http://127.0.0.1:9"), "--model"),
        (("connect", "morph", "--url", "http://127.0.0.1:9", "--model", "m", "--write"), "without --write"),
        (("run", "morph", "--url", "http://127.0.0.1:9", "--model", "m"), "library"),
        (("run", "codex", "--url", "http://127.0.0.1:9", "--model", "m"), "npm install -g @openai/codex"),
    ],
)
def test_errors_are_explained(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    done = paceline(tmp_path, *arguments, PATH=str(tmp_path))
    assert isinstance(done.exception, PacelineError) and words in str(done.exception) and not done.stdout


def program(folder: Path, name: str, script: str) -> str:
    """A PATH on which a shell script takes the place of a client."""
    file = folder / "bin" / name
    file.parent.mkdir()
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return f"{file.parent}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.parametrize("client", ["claude", "codex", "opencode", "aider", "mini"])
def test_run_starts_a_client_with_its_settings_and_no_file(client: str, address: str, tmp_path: Path) -> None:
    path = program(tmp_path, client, 'env; for each in "$@"; do echo "argument $each"; done; exit 7')
    home = tmp_path / "home"
    home.mkdir()
    more = {"PATH": path, "PACELINE_CACHE": str(tmp_path / "cache"), "ANTHROPIC_API_KEY": "mine"}
    done = subprocess.run(
        [sys.executable, "-c", START, client, address, "--flag", "two words"],
        env=environment(home, **more),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 7 and lines[-2:] == ["argument --flag", "argument two words"], done.stderr
    assert list(home.iterdir()) == []
    assert address in done.stdout and "secret" in done.stdout
    assert ("ANTHROPIC_API_KEY=mine" in lines) is (client != "claude")
    if client == "aider":
        (named,) = [line.partition("=")[2] for line in lines if line.startswith("AIDER_MODEL_METADATA_FILE=")]
        assert json.loads(Path(named).read_text())["openai/tiny"]["mode"] == "chat"


def test_run_passes_signals_on(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    path = program(
        tmp_path, "claude", f"trap 'exit 5' TERM; test \"$*\" = '-p now' && touch {ready}; while :; do sleep 0.05; done"
    )
    options = ("--url", "http://127.0.0.1:9", "--model", "m", "--", "-p", "now")
    command = [sys.executable, "-m", "paceline", "run", "claude", *options]
    process = subprocess.Popen(command, env=environment(tmp_path, PATH=path))
    until(ready.exists, 30)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 5


def test_every_client_can_be_found() -> None:
    assert find_client("mini") is CLIENTS["mini-swe-agent"]
    with pytest.raises(InputError, match="claude, codex"):
        find_client("vi")
