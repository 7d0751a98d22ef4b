"""The settings with which each client uses a server: environment variables, a settings file, or command-line options."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import httpx

from paceline.env import cache_dir
from paceline.errors import ConfigError, InputError, Offline, ServeError, Unauthorized, UnknownModel
from paceline.serve.settings_files import SettingsFile
from paceline.tasks.files import write_text

Environment = Mapping[str, str]
_NO_KEY = "none"  # clients require a key even if the server does not
_LEAST_COMPACT_WINDOW = 100_000  # Claude Code raises a smaller auto-compact window to this


@dataclass(frozen=True)
class Server:
    """A server as clients see it. `url` has no /v1; `context` is in tokens, None if unknown; `api_key` may be ""."""

    url: str
    model: str
    context: int | None = None
    api_key: str = ""

    @property
    def output(self) -> int | None:
        """The tokens that a client may reserve for one reply: a quarter of the context at most, so that the prompt fits."""
        return None if self.context is None else min(32_000, self.context // 4)


@dataclass(frozen=True)
class Settings:
    """The settings of one client for a server.

    Two ways suffice to configure a client: `environment` together with the `needed` files, or `files` together with the
    `exported` variables. `start` writes `own_files` (never the user's), adds `launch` to the environment, removes the
    variables in `unset`, and puts `arguments` before the user's.
    """

    environment: Environment
    needed: tuple[SettingsFile, ...] = ()
    files: tuple[SettingsFile, ...] = ()
    exported: Environment = field(default_factory=dict)
    own_files: tuple[SettingsFile, ...] = ()
    launch: Environment = field(default_factory=dict)
    unset: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    note: str = ""

    def shown(self) -> str:
        """Shell commands that set the variables, then the text of each needed file under its path."""
        lines = [f"unset {name}" for name in self.unset] + exports(self.environment)
        parts = ["\n".join(lines)] if lines else []
        parts += [f"# {each.path}\n{each.text().rstrip()}" for each in self.needed]
        parts += [self.note] if self.note else []
        return "\n\n".join(parts)


def exports(environment: Environment) -> list[str]:
    return [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]


def find_server(url: str, model: str | None = None, api_key: str = "") -> Server:
    """The server at `url`, described by its /v1/models; if no server answers, by `model` alone.

    Raises Offline if no server answers and no model is given, Unauthorized for a wrong key, UnknownModel for a model that
    is not served there, ConfigError if `url` is not an address.
    """
    url = url.strip().rstrip("/").removesuffix("/v1")
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        reply = httpx.get(f"{url}/v1/models", headers=headers, timeout=10)
    except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
        raise ConfigError(f"{url!r} is not the address of a server: it must begin with http:// or https://") from error
    except httpx.TransportError as error:
        if model is None:
            raise Offline(f"no server answers at {url}: start one (paceline serve), or give --model NAME") from error
        return Server(url, model, None, api_key)
    if reply.status_code in (401, 403):
        raise Unauthorized(f"the server at {url} requires one of its keys: give --api-key")
    return _read_models(reply, url, model, api_key)


def _read_models(reply: httpx.Response, url: str, model: str | None, api_key: str) -> Server:
    try:
        contexts = {str(each["id"]): each.get("max_model_len") for each in reply.raise_for_status().json()["data"]}
        name = next(iter(contexts)) if model is None else model
    except (httpx.HTTPStatusError, ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise ServeError(f"{url}/v1/models does not answer like a model server (status {reply.status_code})") from error
    if name not in contexts:
        raise UnknownModel(f"the model {name!r} is not served at {url}; served: {', '.join(contexts)}")
    context = contexts[name]
    return Server(url, name, context if isinstance(context, int) else None, api_key)


def _claude(server: Server, environ: Environment) -> Settings:
    variables = {
        "ANTHROPIC_BASE_URL": server.url,
        "ANTHROPIC_AUTH_TOKEN": server.api_key or _NO_KEY,
        "ANTHROPIC_MODEL": server.model,
        "ANTHROPIC_DEFAULT_OPUS_MODEL": server.model,
        "ANTHROPIC_DEFAULT_SONNET_MODEL": server.model,
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": server.model,
        "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }
    if server.context is not None:
        variables["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] = str(server.context)
        variables["CLAUDE_CODE_MAX_OUTPUT_TOKENS"] = str(server.output)
        if server.context >= _LEAST_COMPACT_WINDOW:
            variables["CLAUDE_CODE_AUTO_COMPACT_WINDOW"] = str(server.context)
    folder = Path(environ.get("CLAUDE_CONFIG_DIR") or _home(environ) / ".claude")
    file = SettingsFile(folder / "settings.json", "json", {"env": variables})
    return Settings(variables, files=(file,), unset=("ANTHROPIC_API_KEY",))


def _codex(server: Server, environ: Environment) -> Settings:
    key_name = "PACELINE_API_KEY"
    provider = {"name": "Paceline", "base_url": f"{server.url}/v1", "wire_api": "responses"}
    if server.api_key:
        provider["env_key"] = key_name
    values: dict[str, Any] = {"model": server.model, "model_provider": "paceline"}
    if server.context is not None:
        values["model_context_window"] = server.context
    nested = {**values, "model_providers": {"paceline": provider}}
    folder = Path(environ.get("CODEX_HOME") or _home(environ) / ".codex")
    file = SettingsFile(folder / "config.toml", "toml", nested)
    variables = {key_name: server.api_key} if server.api_key else {}
    flat = values | {f"model_providers.paceline.{key}": value for key, value in provider.items()}
    arguments = [part for key, value in flat.items() for part in ("-c", f"{key}={_toml(value)}")]
    return Settings(variables, (file,), (file,), exported=variables, arguments=tuple(arguments))


def _toml(value: str | int) -> str:
    return json.dumps(value, ensure_ascii=False)


def _opencode(server: Server, environ: Environment) -> Settings:
    model: dict[str, Any] = {"name": server.model}
    if server.context is not None:
        model["limit"] = {"context": server.context, "output": server.output}
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "Paceline",
        "options": {"baseURL": f"{server.url}/v1", "apiKey": server.api_key or _NO_KEY},
        "models": {server.model: model},
    }
    name = f"paceline/{server.model}"
    values = {"model": name, "small_model": name, "provider": {"paceline": provider}}
    folder = _config_home(environ) / "opencode"
    with_comments = folder / "opencode.jsonc"
    path = Path(
        environ.get("OPENCODE_CONFIG") or (with_comments if with_comments.exists() else folder / "opencode.json")
    )
    file = SettingsFile(path, "json", {"$schema": "https://opencode.ai/config.json", **values})
    return Settings({}, (file,), (file,), launch={"OPENCODE_CONFIG_CONTENT": json.dumps(values)})


def _aider(server: Server, environ: Environment) -> Settings:
    name = f"openai/{server.model}"
    variables = {
        "OPENAI_API_BASE": f"{server.url}/v1",
        "OPENAI_API_KEY": server.api_key or _NO_KEY,
        "AIDER_MODEL": name,
    }
    home = _home(environ)
    options = {"model": name, "openai-api-base": f"{server.url}/v1", "openai-api-key": server.api_key or _NO_KEY}
    files = [SettingsFile(home / ".aider.conf.yml", "yaml", options)]
    if server.context is None:
        return Settings(variables, files=tuple(files))
    facts = {"max_input_tokens": server.context, "max_output_tokens": server.output, "litellm_provider": "openai"}
    known = {name: {**facts, "mode": "chat", "input_cost_per_token": 0, "output_cost_per_token": 0}}
    metadata = SettingsFile(home / ".aider.model.metadata.json", "json", known)
    own = SettingsFile(cache_dir() / "clients" / f"aider-{server.model.replace('/', '-')}.json", "json", known)
    launch = {"AIDER_MODEL_METADATA_FILE": str(own.path)}
    return Settings(variables, (metadata,), (*files, metadata), own_files=(own,), launch=launch)


def _mini(server: Server, environ: Environment) -> Settings:
    variables = {
        "MSWEA_MODEL_NAME": f"openai/{server.model}",
        "OPENAI_API_BASE": f"{server.url}/v1",
        "OPENAI_API_KEY": server.api_key or _NO_KEY,
        "MSWEA_COST_TRACKING": "ignore_errors",
        "MSWEA_CONFIGURED": "true",
    }
    base = _home(environ) / "Library/Application Support" if sys.platform == "darwin" else _config_home(environ)
    folder = Path(environ.get("MSWEA_GLOBAL_CONFIG_DIR") or base / "mini-swe-agent")
    return Settings(variables, files=(SettingsFile(folder / ".env", "env", variables),))


def _morph(server: Server, environ: Environment) -> Settings:
    note = f"// set in code: the SDK reads no environment variable for it\nmorphApiUrl: {json.dumps(server.url)}"
    return Settings({"MORPH_API_KEY": server.api_key or _NO_KEY}, note=note)


def _home(environ: Environment) -> Path:
    return Path(environ.get("HOME") or Path.home())


def _config_home(environ: Environment) -> Path:
    return Path(environ.get("XDG_CONFIG_HOME") or _home(environ) / ".config")


@dataclass(frozen=True)
class Client:
    """A client. `program` is its executable, "" for a library; `install` is the command that installs it."""

    settings: Callable[[Server, Environment], Settings]
    program: str
    install: str


CLIENTS = {
    "claude": Client(_claude, "claude", "npm install -g @anthropic-ai/claude-code"),
    "codex": Client(_codex, "codex", "npm install -g @openai/codex"),
    "opencode": Client(_opencode, "opencode", "npm install -g opencode-ai"),
    "aider": Client(_aider, "aider", "pip install aider-chat (in an environment of its own)"),
    "mini-swe-agent": Client(_mini, "mini", "pip install mini-swe-agent (in an environment of its own)"),
    "morph": Client(_morph, "", "npm install @morphllm/morphsdk"),
}
_OTHER_NAMES = {"mini": "mini-swe-agent"}


def find_client(name: str) -> Client:
    client = CLIENTS.get(_OTHER_NAMES.get(name, name))
    if client is None:
        raise InputError(f"the client {name!r} is unknown; known: {', '.join(CLIENTS)}")
    return client


def start(client: Client, server: Server, arguments: Sequence[str], environ: Environment) -> NoReturn:
    """Replaces this process by the client (execve), so that its exit status and signals are the client's.

    The user's files are not changed.
    """
    if not client.program:
        raise InputError("this client is a library: `paceline connect` prints what to set in code")
    program = shutil.which(client.program, path=environ.get("PATH"))
    if program is None:
        raise ConfigError(f"{client.program} is not installed (or not on PATH): {client.install}")
    settings = client.settings(server, environ)
    for each in settings.own_files:
        each.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(each.path, each.text())
    kept = {name: value for name, value in environ.items() if name not in settings.unset}
    for name in ("SIGPIPE", "SIGXFSZ"):  # Python ignores these; the client would inherit that
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
    sys.stdout.flush()
    sys.stderr.flush()
    command = [program, *settings.arguments, *arguments]
    os.execve(program, command, {**kept, **settings.environment, **settings.launch})
