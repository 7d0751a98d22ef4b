"""The command line in a process of its own: real files, a real model (SmolLM2), and bad input of every kind."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
from safetensors.torch import save_file
from tokenizers import processors
from typer.testing import CliRunner, Result

from paceline.cli import app
from paceline.config import EngineConfig
from paceline.engine.engine import Engine
from paceline.errors import ConfigError, FlaggedResult, InputError
from paceline.tasks.apply import Applied
from paceline.types import Request, Sampling, Usage
from tests.models.test_config import values as config_values
from tests.models.test_tokenizer import backend
from tests.tiny import random_tensors, tiny_config

CODE = "import os\n\n\ndef load(path):\n    return open(path).read()\n\n\ndef remove(path):\n    os.remove(path)\n"
EDIT = """\
# ... existing code ...
def load(path):
    with open(path) as file:
        return file.read()


def remove(path):
"""
MERGED = CODE.replace("    return open(path).read()\n", "    with open(path) as file:\n        return file.read()\n")
MODEL = ["--model", "smollm2-135m", "--max-context", "2048", "--device", "cpu"]


def paceline(*arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "paceline", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    code, edit = tmp_path / "store.py", tmp_path / "edit.txt"
    code.write_text(CODE)
    edit.write_text(EDIT)
    return code, edit


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 1 and done.stdout == ""
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) <= 2, done.stderr
    for word in words:
        assert word in done.stderr


def test_help_lists_the_commands_and_every_setting() -> None:
    whole = paceline("--help").stdout
    assert all(command in whole for command in ("pull", "generate", "apply", "bench"))
    one = paceline("generate", "--help").stdout
    assert "--max-batch" in one and "--deterministic" in one


def test_a_check_of_a_path_says_that_there_is_nothing_to_check_against(tmp_path: Path) -> None:
    refused(paceline("pull", str(tmp_path), "--check"), "no digest to check it against")
    assert paceline("pull", str(tmp_path)).stdout == f"{tmp_path}\n"


def test_an_unknown_model_is_refused_by_name(files: tuple[Path, Path]) -> None:
    refused(
        paceline("apply", str(files[0]), "--edit", str(files[1]), "--model", "qwen9"), "qwen9", "qwen2.5-coder-1.5b"
    )


def test_files_that_are_no_text_are_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    binary, latin = tmp_path / "a.bin", tmp_path / "b.py"
    binary.write_bytes(b"\x7fELF\0\0")
    latin.write_bytes("é = 1".encode("latin-1"))
    refused(paceline("apply", str(binary), "--edit", str(files[1])), "binary")
    refused(paceline("apply", str(latin), "--edit", str(files[1])), "UTF-8", "byte 0")
    refused(paceline("apply", str(tmp_path / "none.py"), "--edit", str(files[1])), "cannot read")
    wide = tmp_path / "c.cs"
    wide.write_bytes(CODE.encode("utf-16"))
    refused(paceline("apply", str(wide), "--edit", str(files[1])), "c.cs is UTF-16; only UTF-8 files can be edited")


def test_a_read_only_file_is_refused_before_a_model_is_looked_for(files: tuple[Path, Path]) -> None:
    files[0].chmod(0o444)
    done = paceline("apply", str(files[0]), "--edit", str(files[1]), "--write", "--model", "qwen9")
    refused(done, "read-only")
    assert "qwen9" not in done.stderr


class Merged:
    """Stands for a result; making it takes as long as `meanwhile`, which may change the file."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, text: str, meanwhile: Callable[[], object] = int) -> None:
        def merge(_: object, code: str, *__: object, path: str, **___: object) -> Applied:
            meanwhile()
            return Applied(code, text, (), Usage(0, 0), "stub", path)

        monkeypatch.setattr("paceline.engine.engine.Engine.load", lambda *_: None)
        monkeypatch.setattr("paceline.cli.pull_with_progress", Path)
        monkeypatch.setattr("paceline.tasks.apply.apply", merge)

    def command(self, *arguments: str) -> Result:
        return CliRunner().invoke(app, ["apply", *arguments])


def test_a_file_that_changes_while_the_model_runs_is_not_written(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Merged(monkeypatch, "merged\n", lambda: files[0].write_text("another's work\n"))
    done = run.command(str(files[0]), "--edit", str(files[1]), "--write")
    assert isinstance(done.exception, InputError) and "changed meanwhile" in str(done.exception)
    assert files[0].read_text() == "another's work\n"


def test_a_result_is_written_and_printed_byte_for_byte(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "\ufeffa\r\nb\rc\x1b[31m\x0c\u2028é"
    run = Merged(monkeypatch, text)
    assert run.command(str(files[0]), "--edit", str(files[1])).stdout_bytes == text.encode()
    done = run.command(str(files[0]), "--edit", str(files[1]), "--write")
    assert done.exit_code == 0 and done.stdout == "" and files[0].read_bytes() == text.encode()


def test_the_diff_names_a_file_from_the_folder_one_is_in(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = Merged(monkeypatch, "merged\n")
    arguments = (str(files[0]), "--edit", str(files[1]), "--diff")
    monkeypatch.chdir(tmp_path)
    shown = run.command(*arguments).stdout
    assert shown.startswith("--- a/store.py\n")
    subprocess.run(["git", "apply", "-"], input=shown, text=True, check=True)
    assert files[0].read_text() == "merged\n"
    (tmp_path / "deeper").mkdir()
    monkeypatch.chdir(tmp_path / "deeper")
    assert run.command(*arguments).stdout == ""
    files[0].write_text(CODE)
    assert run.command(*arguments).stdout.startswith(f"--- a{files[0]}\n")


@pytest.fixture
def without_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes looking for a model, or loading one, fail."""

    def fail(*_: object) -> NoReturn:
        raise AssertionError("a model is asked for")

    monkeypatch.setattr("paceline.engine.engine.Engine.load", fail)
    monkeypatch.setattr("paceline.cli.pull_with_progress", fail)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["apply", *arguments])


@pytest.mark.usefixtures("without_model")
def test_an_edit_without_a_doubt_loads_no_model(files: tuple[Path, Path]) -> None:
    files[1].write_text(f"{EDIT}# ... existing code ...\n")
    arguments = (str(files[0]), "--edit", str(files[1]))
    done = run(*arguments)
    assert done.exit_code == 0 and done.stdout == MERGED and done.stderr == ""
    values = json.loads(run(*arguments, "--json").stdout)
    assert (values["text"], values["source"], values["policy"]) == (MERGED, "rule", "auto")
    assert values["reasons"] == [] and values["flagged"] is False and values["usage"]["output_tokens"] == 0
    written = run(*arguments, "--write")
    assert written.exit_code == 0 and written.stdout == "" and files[0].read_text() == MERGED


@pytest.mark.usefixtures("without_model")
@pytest.mark.parametrize("policy", ["review", "review-margin", "opened"])
def test_other_policies_ask_the_model_though_there_is_no_doubt(files: tuple[Path, Path], policy: str) -> None:
    done = run(str(files[0]), "--edit", str(files[1]), "--policy", policy)
    assert isinstance(done.exception, AssertionError) and str(done.exception) == "a model is asked for"


@pytest.mark.usefixtures("without_model")
def test_an_unknown_policy_names_the_nearest(files: tuple[Path, Path]) -> None:
    done = run(str(files[0]), "--edit", str(files[1]), "--policy", "reviews")
    assert isinstance(done.exception, ConfigError) and "did you mean 'review'" in str(done.exception)


@pytest.mark.usefixtures("without_model")
def test_a_doubt_with_no_other_reading_is_flagged_without_a_model(files: tuple[Path, Path]) -> None:
    files[1].write_text("class Elephant:\n    trunk = 1\n")
    arguments = (str(files[0]), "--edit", str(files[1]))
    done = run(*arguments, "--write")
    assert isinstance(done.exception, FlaggedResult) and "flagged: 'class Elephant:' is new" in done.stderr
    assert "+class Elephant:" in done.stdout.splitlines() and files[0].read_text() == CODE
    forced = run(*arguments, "--write", "--force")
    assert forced.exit_code == 0 and "flagged:" in forced.stderr
    assert files[0].read_text() == f"{CODE}\n\nclass Elephant:\n    trunk = 1\n"


@pytest.mark.usefixtures("without_model")
def test_two_readings_are_put_to_the_model(files: tuple[Path, Path], tmp_path: Path) -> None:
    table = tmp_path / "a.sql"
    table.write_text("\n".join(f"CREATE TABLE {name} (\n  id INT,\n  name TEXT,\n  size INT\n);\n" for name in "ab"))
    files[1].write_text("-- ...\n  name TEXT NOT NULL,\n  size INT\n-- ...\n")
    done = run(str(table), "--edit", str(files[1]))
    assert isinstance(done.exception, AssertionError) and str(done.exception) == "a model is asked for"


def in_shell(script: str) -> subprocess.CompletedProcess[str]:
    """Runs a script with $paceline."""
    environment = {**os.environ, "paceline": f"{shlex.quote(sys.executable)} -m paceline"}
    return subprocess.run(
        ["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("$paceline compact - <&-", "standard input is closed"),
        ("$paceline apply store.py --edit - <&-", "cannot read store.py"),
        ("$paceline generate - --model qwen9 <&-", "standard input is closed"),
        ("$paceline compact - >&- <<< text", "standard output is closed"),
        ("$paceline compact - > /dev/full <<< text", "No space left on device"),
        ("yes text | head -100000 | $paceline compact - > /dev/full", "No space left on device"),
        ("$paceline compact --help > /dev/full", "No space left on device"),
    ],
)
def test_closed_streams_and_a_full_disk_are_one_line(script: str, words: str) -> None:
    refused(in_shell(script), words)


def test_a_reader_that_has_gone_is_no_error() -> None:
    done = in_shell("yes text | head -100000 | $paceline compact - --ratio 1 | true; exit ${PIPESTATUS[2]}")
    assert done.returncode == 141 and done.stderr == ""


@pytest.mark.parametrize("stage", ["importing", "reading"])
def test_an_interrupt_is_one_line(stage: str) -> None:
    command = [sys.executable, "-m", "paceline", *(["bench"] if stage == "importing" else ["compact", "-"])]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    if stage == "importing":
        maps = Path(f"/proc/{process.pid}/maps")
        if not maps.exists():
            pytest.skip("the system does not show what a process has loaded")
        began = time.monotonic()
        while "libtorch" not in maps.read_text():
            assert time.monotonic() - began < 60
            time.sleep(0.01)
    else:
        process.stdin.write(b"text\n" * 100_000)  # more than a pipe holds: it is being read
        time.sleep(0.5)  # until it waits for more: Python handles a signal between two reads only after the second
        time.sleep(1.0)  # now it waits: CPython handles no signal between two reads of one `read()`
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert (process.stdout.read(), process.stderr.read()) == (b"", b"interrupted\n")
    process.communicate()


@pytest.mark.model
def test_a_forced_result_is_written_and_links_and_mode_stay(files: tuple[Path, Path], tmp_path: Path) -> None:
    os.link(files[0], tmp_path / "linked.py")
    files[0].chmod(0o750)
    options = ("--edit", str(files[1]), "--write", "--force", "--policy", "plain", *MODEL)
    done = paceline("apply", str(files[0]), *options)
    assert done.returncode == 0 and done.stdout == ""
    assert files[0].samefile(tmp_path / "linked.py") and files[0].stat().st_mode & 0o7777 == 0o750
    assert sorted(os.listdir(tmp_path)) == ["edit.txt", "linked.py", "store.py"]


def test_an_empty_edit_and_two_standard_inputs_are_refused(files: tuple[Path, Path]) -> None:
    refused(paceline("apply", str(files[0]), "--edit", "-", stdin=" \n"), "empty")
    refused(paceline("apply", "-", "--edit", "-", stdin=CODE), "standard input")
    refused(paceline("apply", "-", "--edit", str(files[1]), "--write", stdin=CODE), "--write needs a file")


def test_an_edit_that_matches_nowhere_is_refused(files: tuple[Path, Path]) -> None:
    refused(
        paceline("apply", str(files[0]), "--edit", "-", stdin="trunk = elephant(1)\n"), "no line of the edit is found"
    )


@pytest.mark.model
def test_a_device_that_is_absent_is_refused(files: tuple[Path, Path]) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    refused(paceline("generate", "hi", "--model", "smollm2-135m", "--device", "cuda"), "cuda")


@pytest.mark.model
def test_a_file_over_the_context_is_refused_before_any_compute(tmp_path: Path, files: tuple[Path, Path]) -> None:
    files[0].write_text(CODE * 100)
    began = time.monotonic()
    refused(paceline("apply", str(files[0]), "--edit", str(files[1]), "--policy", "review", *MODEL), "context")
    assert time.monotonic() - began < 60


@pytest.mark.model
def test_a_flagged_merge_is_not_written_without_force(files: tuple[Path, Path]) -> None:
    """SmolLM2 cannot copy a file, so what it writes without help is flagged."""
    done = paceline("apply", str(files[0]), "--edit", str(files[1]), "--write", "--policy", "plain", *MODEL)
    assert done.returncode == 1 and "flagged:" in done.stderr
    assert files[0].read_text() == CODE
    shown = paceline("apply", str(files[0]), "--edit", str(files[1]), "--json", "--policy", "plain", *MODEL)
    values = json.loads(shown.stdout)
    assert values["flagged"] and values["reasons"] and values["usage"]["output_tokens"] > 0


def test_a_raw_prompt_begins_as_the_tokenizer_begins_it(tmp_path: Path) -> None:
    made = backend()
    made.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 460)]
    )
    made.save(str(tmp_path / "tokenizer.json"))
    config = tiny_config("llama", vocab_size=480, tie_embeddings=False)
    shapes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "vocab_size": 480}
    (tmp_path / "config.json").write_text(json.dumps(config_values(**shapes, rms_norm_eps=1e-6)))
    save_file(dict(random_tensors(config)), tmp_path / "model.safetensors")
    engine = Engine.load(tmp_path, EngineConfig(device="cpu"))
    lines = [
        engine.generate([Request(tokens, Sampling(max_tokens=12))])[0].text
        for tokens in (engine.tokenizer.encode_prompt("def f"), engine.tokenizer.encode("def f"))
    ]
    command = ["generate", "def f", "--raw", "--max-tokens", "12", "--model", str(tmp_path), "--device", "cpu"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0 and done.stdout == f"{lines[0]}\n" and lines[0] != lines[1]


@pytest.mark.model
def test_generate_streams_an_answer() -> None:
    done = paceline("generate", "What is 2 + 2?", "--max-tokens", "12", *MODEL)
    assert done.returncode == 0 and done.stdout.strip()


@pytest.mark.model
def test_an_interrupt_leaves_the_file_as_it_was(files: tuple[Path, Path]) -> None:
    options = ("--edit", str(files[1]), "--write", "--policy", "review", *MODEL)
    command = [sys.executable, "-m", "paceline", "apply", str(files[0]), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)
    assert files[0].read_text() == CODE or process.returncode == 0  # a fast machine is done by then
    assert sorted(os.listdir(files[0].parent)) == ["edit.txt", "store.py"]
