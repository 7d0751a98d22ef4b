"""What the benchmarks share: their options, the machine they run on, a server process, and the last line of JSON."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODEL = "qwen2.5-coder-1.5b"  # of the published figures


def argument_parser(doc: str | None, model: str | None = None) -> argparse.ArgumentParser:
    """A parser whose help is the module's docstring. It has --model where `model` names a default."""
    text = doc or ""
    formatter = argparse.RawDescriptionHelpFormatter
    command = f"python -m {_module_name()}"
    parser = argparse.ArgumentParser(prog=command, description=text, formatter_class=formatter)
    if model is not None:
        parser.add_argument("--model", default=model, help="a name that `paceline pull` knows, or a path")
    return parser


def _module_name() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0]).stem


def numbers(text: str) -> list[int]:
    """Whole numbers separated by commas, as an option's type."""
    return [int(each) for each in text.split(",")]


def names(text: str) -> list[str]:
    """Names separated by commas, as an option's type."""
    return text.split(",")


def machine() -> dict[str, Any]:
    """The device, the versions and the number of threads of this run."""
    import torch

    on_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else _processor(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
    }


def _processor() -> str:
    """The processor's name, and which of the instruction sets that the CPU kernels use it has."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    facts = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
    named = {key.strip(): value.split() for key, value in facts.items()}
    known = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in named.get("flags", [])]
    return " ".join([*named.get("model name", [platform.machine()]), *known])


def quantiles(values: list[float]) -> dict[str, float]:
    """Minimum, median and maximum; zeros where there are no values."""
    ordered = sorted(values) or [0.0]
    return {"min": ordered[0], "median": statistics.median(ordered), "max": ordered[-1]}


def percentiles(values: list[float]) -> dict[str, float]:
    """Median, 99th percentile and maximum; zeros where there are no values."""
    ordered = sorted(values) or [0.0]
    return {"p50": statistics.median(ordered), "p99": ordered[math.ceil(len(ordered) * 0.99) - 1], "max": ordered[-1]}


def milliseconds(seconds: list[float], share: float) -> float:
    """The least of the times, in milliseconds, that at least `share` of the times do not exceed."""
    ordered = sorted(seconds) or [0.0]
    return round(1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))], 2)


@contextlib.contextmanager
def serving(model: str, *options: str) -> Iterator[str]:
    """Runs `paceline serve` in a process of its own during the block; yields its URL once it is ready."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "paceline", "serve", model, "--port", str(port), *options]
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(command) as process:
        try:
            while not _ready(url):
                if process.poll() is not None:
                    sys.exit("the server did not start; its output is above")
                time.sleep(0.2)
            yield url
        finally:
            process.terminate()


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def finish(result: dict[str, Any]) -> None:
    """Prints the result and the machine as the last line, in JSON."""
    print(json.dumps({**result, "machine": machine()}))
