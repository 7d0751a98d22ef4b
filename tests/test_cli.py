"""The command line in a process of its own: real files, a real model (SmolLM2), and bad input of every kind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CODE = "import os\n\n\ndef load(path):\n    return open(path).read()\n\n\ndef remove(path):\n    os.remove(path)\n"
EDIT = """\
# ... existing code ...
def load(path):
    with open(path) as file:
        return file.read()


def remove(path):
"""
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


def test_an_empty_edit_and_two_standard_inputs_are_refused(files: tuple[Path, Path]) -> None:
    refused(paceline("apply", str(files[0]), "--edit", "-", stdin=" \n"), "empty")
    refused(paceline("apply", "-", "--edit", "-", stdin=CODE), "standard input")
    refused(paceline("apply", "-", "--edit", str(files[1]), "--write", stdin=CODE), "--write needs a file")


@pytest.mark.model
def test_an_edit_that_matches_nowhere_is_refused(files: tuple[Path, Path]) -> None:
    refused(paceline("apply", str(files[0]), "--edit", "-", *MODEL, stdin="class Elephant:\n    trunk = 1\n"), "found")


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
    refused(paceline("apply", str(files[0]), "--edit", str(files[1]), *MODEL), "context")
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


@pytest.mark.model
def test_generate_streams_an_answer() -> None:
    done = paceline("generate", "What is 2 + 2?", "--max-tokens", "12", *MODEL)
    assert done.returncode == 0 and done.stdout.strip()


@pytest.mark.model
def test_an_interrupt_leaves_the_file_as_it_was(files: tuple[Path, Path]) -> None:
    command = [sys.executable, "-m", "paceline", "apply", str(files[0]), "--edit", str(files[1]), "--write", *MODEL]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)
    assert files[0].read_text() == CODE or process.returncode == 0  # a fast machine is done by then
    assert sorted(os.listdir(files[0].parent)) == ["edit.txt", "store.py"]
