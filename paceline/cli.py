"""The command line. Options for engine settings are generated from EngineConfig.

Commands have more than eight parameters where each is one option of the command line: Typer reads them from the signature.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import inspect
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, get_args, get_type_hints

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from paceline.cli_train import app as train_app
from paceline.cli_train import evaluate_app, export
from paceline.config import EngineConfig
from paceline.env import api_key as environment_key
from paceline.errors import ConfigError, EmptyEdit, FlaggedResult, InputError, PacelineError
from paceline.interrupts import exiting_on_interrupt

if TYPE_CHECKING:
    from paceline.engine.engine import Engine

app = typer.Typer(
    help="Fast serving of open models to coding agents.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(train_app, name="train")
app.add_typer(evaluate_app, name="evaluate")
app.command()(export)
DEFAULT_MODEL = "qwen2.5-coder-1.5b"
_errors = Console(stderr=True)
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds an option for each engine setting to a command, which receives them as one `config`."""
    hints = get_type_hints(EngineConfig)
    parameters = [
        each for each in inspect.signature(command, eval_str=True).parameters.values() if each.name != "config"
    ]
    names = []
    for setting in dataclasses.fields(EngineConfig):
        names.append(setting.name)
        kind = next((each for each in get_args(hints[setting.name]) if each is not type(None)), hints[setting.name])
        option = typer.Option(help=setting.metadata["help"], rich_help_panel="Engine")
        parameters.append(
            inspect.Parameter(
                setting.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=setting.default,
                annotation=Annotated[kind if setting.default is not None else kind | None, option],
            )
        )

    @functools.wraps(command)
    def wrapped(**values: Any) -> Any:
        settings = {name: values.pop(name) for name in names}
        return command(config=EngineConfig.from_dict(settings), **values)

    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    del wrapped.__wrapped__
    return wrapped


@app.command()
def pull(
    name: Annotated[str, typer.Argument(help="a model's name, or owner/name on the Hugging Face hub")],
    *,
    check: Annotated[
        bool, typer.Option(help="verify the cached files against their digests, and fetch damaged ones again")
    ] = False,
) -> None:
    """Downloads a model, checks its digest and caches it; prints its path. Resumes an interrupted pull."""
    typer.echo(pull_with_progress(name, check))


def load_engine(model: str, config: EngineConfig) -> Engine:
    """Loads a model's engine. Pulls the model first if it is not cached."""
    with exiting_on_interrupt():
        from paceline.engine.engine import Engine

    return Engine.load(pull_with_progress(model), config)


def pull_with_progress(name: str, check: bool = False) -> Path:
    """`models.pull.pull`, with a progress bar on standard error."""
    from paceline.models.pull import pull as fetch

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=_errors, transient=True) as progress:
        task = progress.add_task(name, total=None)

        def show(done: int, total: int, label: str) -> None:
            progress.update(task, completed=done, total=total, description=label)

        return fetch(name, progress=show, check=check)


@app.command()
@engine_options
def generate(
    prompt: Annotated[str, typer.Argument(help="the prompt, or - for standard input")],
    *,
    model: Annotated[str, typer.Option(help="a model's name or path")] = DEFAULT_MODEL,
    raw: Annotated[bool, typer.Option(help="continue the text as it is, without the chat template")] = False,
    max_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: Annotated[int | None, typer.Option()] = None,
    config: EngineConfig,
) -> None:
    """Answers one prompt, streamed to standard output."""
    from paceline.tasks.files import read_text
    from paceline.types import Request, Sampling

    text = read_text("-") if prompt == "-" else prompt
    engine = load_engine(model, config)
    tokenizer = engine.tokenizer
    tokens = tokenizer.encode_prompt(text) if raw else tokenizer.encode_chat([{"role": "user", "content": text}])
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, max_tokens=max_tokens)
    for output in engine.stream(Request(tokens, sampling)):
        typer.echo(output.text, nl=False)
        if output.error is not None:
            typer.echo()
            raise output.error
    typer.echo()


@app.command()
@engine_options
def apply(
    file: Annotated[str, typer.Argument(help="the file to edit, or - for standard input")],
    *,
    edit: Annotated[str, typer.Option(help="a file with the edit snippet, or - for standard input")],
    instruction: Annotated[str, typer.Option(help="what the edit does, in a sentence")] = "",
    model: Annotated[str, typer.Option(help="a model's name or path")] = DEFAULT_MODEL,
    policy: Annotated[str | None, typer.Option(help="whether and how the model is asked (docs/apply.md)")] = None,
    diff: Annotated[bool, typer.Option(help="print the change as a unified diff instead of the file")] = False,
    write: Annotated[bool, typer.Option(help="write the result into the file")] = False,
    force: Annotated[bool, typer.Option(help="write or print a flagged result too")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print text, diff, reasons and usage as JSON")] = False,
    config: EngineConfig,
) -> None:
    """Merges an edit snippet into a file. A result that fails a check is flagged and, without --force, not written."""
    from paceline.tasks.apply import apply as merge
    from paceline.tasks.files import check_writable, read_text, write_text

    if file == "-" and edit == "-":
        raise InputError("only one of the file and the edit can come from standard input")
    if write and file == "-":
        raise InputError("--write needs a file, not standard input")
    code, update = read_text(file), read_text(edit).removeprefix("\ufeff")
    if write:
        check_writable(Path(file))
    if not update.strip():
        raise EmptyEdit("the edit is empty")
    path = None if file == "-" else _relative_path(file)
    result = merge(lambda: load_engine(model, config), code, update, instruction, path=path, policy=policy)
    if as_json:
        _write_output(f"{json.dumps(result.as_dict())}\n")
    elif diff or (result.reasons and not force):
        _write_output(result.diff())
    elif not write:
        _write_output(result.text)
    for reason in result.reasons:
        _errors.print(f"[yellow]flagged:[/] {escape(reason)}", highlight=False)
    if result.reasons and not force:
        raise FlaggedResult(result.reasons)
    if write:
        write_text(Path(file), result.text, expected=code)


def _relative_path(file: str) -> str:
    """The path for the diff's header: relative to the current folder if the file is inside it, as `git apply` expects."""
    relative = os.path.relpath(file)
    return file if relative.startswith(os.pardir) else relative


def _write_output(text: str) -> None:
    """Writes text to standard output unchanged, as UTF-8 in any locale. Raises PacelineError if it is closed."""
    if sys.stdout is None:
        raise PacelineError("standard output is closed")
    typer.echo(text.encode("utf-8"), nl=False)


@app.command()
def compact(
    files: Annotated[list[str], typer.Argument(help="the files, or - for standard input")],
    *,
    query: Annotated[str | None, typer.Option(help="what the lines are needed for")] = None,
    ratio: Annotated[float, typer.Option(help="the share of characters to keep, 0.05 to 1")] = 0.5,
    markers: Annotated[bool, typer.Option(help="mark where lines were dropped, and how many")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="print texts, line ranges and sizes as JSON")] = False,
) -> None:
    """Prints the lines of files that are most relevant to a query, unchanged. Needs no model (docs/compact.md)."""
    from paceline.tasks.compact import compact as shorten
    from paceline.tasks.files import read_text
    from paceline.tasks.scoring import FILES, ConversationMessage, LineScorer

    if files.count("-") > 1:
        raise InputError("only one of the files can come from standard input")
    messages = [ConversationMessage("user", read_text(name), None if name == "-" else name) for name in files]
    scorer = LineScorer(FILES)
    result = shorten(messages, query or "", ratio=ratio, preserve_recent=0, markers=markers, scorer=scorer)
    _write_output(f"{json.dumps(result.as_dict())}\n" if as_json else result.text)


@app.command()
@engine_options
def serve(
    model: Annotated[str, typer.Argument(help="a model's name or path")] = DEFAULT_MODEL,
    *,
    host: Annotated[str, typer.Option(help="the address to listen at")] = "127.0.0.1",
    port: int = 8000,
    api_key: Annotated[
        list[str] | None, typer.Option(help="a key that clients must send (or PACELINE_API_KEY); may be repeated")
    ] = None,
    api_keys_file: Annotated[Path | None, typer.Option(help="a file of keys, one a line, plain or sha256:HEX")] = None,
    allow_open: Annotated[bool, typer.Option(help="accept connections from other machines without a key")] = False,
    alias: Annotated[list[str] | None, typer.Option(help="another name for the model; may be repeated")] = None,
    apply_alias: Annotated[
        list[str] | None, typer.Option(help="another name for Morph's apply; may be repeated")
    ] = None,
    queue: Annotated[
        int | None, typer.Option(help="requests that may wait in the queue (default: three times max-batch)")
    ] = None,
    request_timeout: Annotated[
        float | None, typer.Option(help="seconds a request may take (default: no limit)")
    ] = None,
    body_limit: Annotated[int, typer.Option(help="maximum size of a request body in bytes")] = 32 << 20,
    share_cache: Annotated[
        bool, typer.Option(help="let clients with different keys use each other's cached prefixes")
    ] = False,
    cors: Annotated[
        list[str] | None, typer.Option(help="an origin whose web pages may use the server, or *; may be repeated")
    ] = None,
    store_mb: Annotated[int, typer.Option(help="megabytes of stored responses (/v1/responses); 0 stores none")] = 256,
    store_minutes: Annotated[float, typer.Option(help="minutes a response is kept after its last use")] = 60.0,
    greedy: Annotated[
        bool, typer.Option(help="temperature 0 for requests that give none (default: the model's own sampling)")
    ] = False,
    warmup: Annotated[
        bool | None,
        typer.Option(help="build kernels and capture CUDA graphs before accepting requests (default: on CUDA)"),
    ] = None,
    log_format: Annotated[str, typer.Option(help="text or json; one line per request, without its content")] = "text",
    config: EngineConfig,
) -> None:
    """Serves a model over HTTP: OpenAI's and Anthropic's APIs, and Morph's apply."""
    try:
        from paceline.serve import run
    except ModuleNotFoundError as error:
        missing = (error.name or "paceline").split(".")[0]
        if missing == "paceline":
            raise
        raise ConfigError(f"serving needs {missing}: pip install 'paceline[serve]'") from error

    keys = run.keys_of(api_key or [], api_keys_file)
    run.check_address(host, keys, allow_open)
    limits = run.Limits(
        queue, request_timeout, body_limit, share_cache, tuple(cors or ()), store_mb << 20, 60 * store_minutes
    )
    run.set_up_log(log_format)
    engine = load_engine(model, config)
    name = Path(model).name if Path(model).exists() else model
    service = run.make_service(engine, [name, *(alias or [])], keys, limits, warmup, apply_alias or [], greedy)
    run.serve(service, host, port)


Url = Annotated[str, typer.Option(help="the server's address")]
ModelName = Annotated[str | None, typer.Option(help="one of the server's models (default: its first)")]
ApiKey = Annotated[str | None, typer.Option(help="one of the server's keys (or PACELINE_API_KEY)")]
LOCAL_URL = "http://127.0.0.1:8000"


@app.command()
def connect(
    client: Annotated[str, typer.Argument(help="claude, codex, opencode, aider, mini-swe-agent or morph")],
    *,
    url: Url = LOCAL_URL,
    model: ModelName = None,
    api_key: ApiKey = None,
    write: Annotated[bool, typer.Option(help="write the client's settings file, keeping a copy of the old")] = False,
) -> None:
    """Prints, or writes, the settings with which a client uses a server."""
    from paceline.serve.connect import exports, find_client, find_server

    kind = find_client(client)
    server = find_server(url, model, api_key or environment_key() or "")
    settings = kind.settings(server, os.environ)
    if server.context is None:
        _errors.print("[yellow]note:[/] the server does not report a context size, so none is set", highlight=False)
    if not write:
        typer.echo(settings.shown())
        return
    if not settings.files:
        raise InputError(f"{client} reads no settings file; run this without --write to see what to set")
    for file in settings.files:
        changed, copy = file.write()
        kept = f", the old one is {copy}" if copy else ""
        typer.echo(f"wrote {file.path}{kept}" if changed else f"{file.path} has these settings already")
    if settings.exported:
        typer.echo("\n".join(["still to be set, since the file cannot hold it:", *exports(settings.exported)]))


@app.command("run")
def run_client(
    client: Annotated[str, typer.Argument(help="claude, codex, opencode, aider or mini")],
    arguments: Annotated[list[str] | None, typer.Argument(help="the client's own arguments, after --")] = None,
    *,
    url: Url = LOCAL_URL,
    model: ModelName = None,
    api_key: ApiKey = None,
) -> None:
    """Starts an installed client with a server: paceline run claude -- -p "fix it". Does not change its settings files."""
    from paceline.serve.connect import find_client, find_server, start

    kind = find_client(client)
    start(kind, find_server(url, model, api_key or environment_key() or ""), arguments or [], os.environ)


@app.command()
@engine_options
def bench(
    *,
    model: Annotated[str, typer.Option(help="a model's name or path")] = DEFAULT_MODEL,
    prompt_tokens: int = 1024,
    output_tokens: int = 64,
    batch: int = 1,
    config: EngineConfig,
) -> None:
    """Times prefill and plain decoding of random prompts. The full benchmarks are in the benchmarks folder."""
    from paceline.engine.bench import measure

    plain = dataclasses.replace(config, drafter="none")
    engine = load_engine(model, plain)
    typer.echo(json.dumps(measure(engine, prompt_tokens, output_tokens, batch)))


def main() -> None:
    """Runs the command line and exits. An error prints one line on standard error.

    The exit status is 1 for a PacelineError and for a full disk, 2 for wrong usage, 130 for an interrupt, and 141 if the reader
    of standard output has closed it (without a line).
    """
    try:
        app(standalone_mode=True)
    except PacelineError as error:
        _exit(1, f"[red]error:[/] {escape(str(error))}")
    except BrokenPipeError:
        _exit(141)
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        output = error.filename or "the output"
        _exit(1, f"[red]error:[/] cannot write {escape(str(output))}: {error.strerror}")
    except KeyboardInterrupt:
        _exit(130, "interrupted")
    except SystemExit as end:  # raised by Typer; its context is the cause
        if isinstance(end.__context__, BrokenPipeError):
            _exit(141)
        if end.code == 130:
            _exit(130, "interrupted")
        raise


def _exit(status: int, message: str = "") -> NoReturn:
    """Exits the process. Discards what standard output still buffers: it cannot be written, or nobody reads it."""
    if sys.stdout is not None:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if message:
        _errors.print(message, highlight=False, soft_wrap=True)
    sys.exit(status)
