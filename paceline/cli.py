"""The command line: pull, generate, apply, serve, bench. Engine settings are options, generated from EngineConfig."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from paceline.config import EngineConfig
from paceline.errors import ConfigError, EmptyEdit, FlaggedResult, InputError, PacelineError

app = typer.Typer(
    help="Fast serving of open models to coding agents.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
DEFAULT_MODEL = "qwen2.5-coder-1.5b"
_errors = Console(stderr=True)


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds one option a setting to a command, which receives them together as `config`."""
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
def pull(name: Annotated[str, typer.Argument(help="a model's name, or owner/name on the Hugging Face hub")]) -> None:
    """Gets a model, checks its digest and keeps it; prints its path. Resumes where an earlier pull stopped."""
    typer.echo(pull_with_progress(name))


def pull_with_progress(name: str) -> Path:
    """`models.pull.pull`, with a progress bar on standard error."""
    from paceline.models.pull import pull as fetch

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=_errors, transient=True) as progress:
        task = progress.add_task(name, total=None)

        def show(done: int, total: int, label: str) -> None:
            progress.update(task, completed=done, total=total, description=label)

        return fetch(name, progress=show)


@app.command()
@engine_options
def generate(
    prompt: Annotated[str, typer.Argument(help="the prompt, or - for standard input")],
    *,
    model: Annotated[str, typer.Option(help="a model's name or path")] = DEFAULT_MODEL,
    raw: Annotated[bool, typer.Option(help="no chat template: continue the text")] = False,
    max_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: Annotated[int | None, typer.Option()] = None,
    config: EngineConfig,
) -> None:
    """Answers one prompt, streamed."""
    from paceline.engine.engine import Engine
    from paceline.types import Request, Sampling

    text = sys.stdin.read() if prompt == "-" else prompt
    engine = Engine.load(pull_with_progress(model), config)
    tokenizer = engine.tokenizer
    tokens = tokenizer.encode(text) if raw else tokenizer.encode_chat([{"role": "user", "content": text}])
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, max_tokens=max_tokens)
    for output in engine.stream(Request(tokens, sampling)):
        typer.echo(output.text, nl=False)
    typer.echo()


@app.command()
@engine_options
def apply(
    file: Annotated[str, typer.Argument(help="the file to edit, or - for standard input")],
    *,
    edit: Annotated[str, typer.Option(help="a file with the edit snippet, or - for standard input")],
    instruction: Annotated[str, typer.Option(help="what the edit does, in a sentence")] = "",
    model: Annotated[str, typer.Option(help="a model's name or path")] = DEFAULT_MODEL,
    policy: Annotated[str | None, typer.Option(help="how the model is asked (docs/apply.md)")] = None,
    diff: Annotated[bool, typer.Option(help="print the change as a unified diff instead of the file")] = False,
    write: Annotated[bool, typer.Option(help="write the result into the file")] = False,
    force: Annotated[bool, typer.Option(help="write or print a flagged result too")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print text, diff, reasons and usage as JSON")] = False,
    config: EngineConfig,
) -> None:
    """Merges an edit snippet into a file. A result that fails a check is flagged, and not written without --force."""
    from paceline.engine.engine import Engine
    from paceline.tasks.apply import apply as merge
    from paceline.tasks.files import read_text, write_text

    if file == "-" and edit == "-":
        raise InputError("only one of the file and the edit can come from standard input")
    if write and file == "-":
        raise InputError("--write needs a file, not standard input")
    code, update = read_text(file), read_text(edit)
    if not update.strip():
        raise EmptyEdit("the edit is empty")
    engine = Engine.load(pull_with_progress(model), config)
    path = None if file == "-" else file
    result = merge(engine, code, update, instruction, path=path, policy=policy)
    if as_json:
        typer.echo(json.dumps(result.as_dict()))
    elif diff or (result.reasons and not force):
        typer.echo(result.diff(), nl=False)
    elif not write:
        typer.echo(result.text, nl=False)
    for reason in result.reasons:
        _errors.print(f"[yellow]flagged:[/] {escape(reason)}", highlight=False)
    if result.reasons and not force:
        raise FlaggedResult(result.reasons)
    if write:
        write_text(Path(file), result.text)


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
    allow_open: Annotated[bool, typer.Option(help="serve other machines without a key")] = False,
    alias: Annotated[list[str] | None, typer.Option(help="another name for the model; may be repeated")] = None,
    config: EngineConfig,
) -> None:
    """Serves a model over HTTP: OpenAI's and Anthropic's APIs, and Morph's apply."""
    try:
        from paceline.serve.run import check_address, keys_of
        from paceline.serve.run import serve as run
    except ModuleNotFoundError as error:
        missing = (error.name or "paceline").split(".")[0]
        if missing == "paceline":
            raise
        raise ConfigError(f"serving needs {missing}: pip install 'paceline[serve]'") from error
    from paceline.engine.engine import Engine

    keys = keys_of(api_key or [])
    check_address(host, keys, allow_open)
    engine = Engine.load(pull_with_progress(model), config)
    run(engine, model, host=host, port=port, keys=keys, aliases=alias or [])


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
    """Times prefill and plain decoding of random prompts; the benchmarks folder has the full ones."""
    from paceline.engine.bench import measure
    from paceline.engine.engine import Engine

    plain = dataclasses.replace(config, drafter="none")
    engine = Engine.load(pull_with_progress(model), plain)
    typer.echo(json.dumps(measure(engine, prompt_tokens, output_tokens, batch)))


def main() -> None:
    """Runs the command line; an error of the tree is one line on standard error and exit status 1."""
    try:
        app(standalone_mode=True)
    except PacelineError as error:
        _errors.print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except BrokenPipeError:
        sys.exit(141)
