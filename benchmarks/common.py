"""What every benchmark shares: where the data is, what it ran on, and its last line of JSON."""

from __future__ import annotations

import contextlib
import gzip
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
DATA = Path(os.environ.get("PACELINE_DATA", ROOT.parent / "shared" / "data"))


def data_path(relative: str) -> Path:
    """A file of the data set, beside the checkout or where PACELINE_DATA says. Exits with one sentence if it is absent."""
    path = DATA / relative
    if not path.exists():
        sys.exit(
            f"the data file {relative} is not in {DATA}; name another with the option, or the folder in PACELINE_DATA"
        )
    return path


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a .jsonl or .jsonl.gz file."""
    if not path.exists():
        sys.exit(f"there is no file {path}")
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def load_edits(
    path: Path | None, split: str | None = "dev", limit: int | None = None, longest: int = 2500
) -> list[dict[str, Any]]:
    """Edits in the form of git_edits.jsonl.gz with at most `longest` tokens before and after; all splits for None."""
    records = read_records(path or data_path("edits/git_edits.jsonl.gz"))
    chosen = [
        record
        for record in records
        if (split is None or record.get("split", split) == split)
        and max(record.get("before_tok", 0), record.get("after_tok", 0)) <= longest
    ]
    return chosen[:limit]


def machine() -> dict[str, Any]:
    """Device, versions and threads: what a figure was measured on."""
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
    """The processor's name and which of the instructions that decide a CPU's rates it has."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    facts = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
    named = {key.strip(): value.split() for key, value in facts.items()}
    known = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in named.get("flags", [])]
    return " ".join([*named.get("model name", [platform.machine()]), *known])


def quantiles(values: list[float]) -> dict[str, float]:
    """Least, median and most."""
    ordered = sorted(values) or [0.0]
    return {"min": ordered[0], "median": statistics.median(ordered), "max": ordered[-1]}


def percentiles(values: list[float]) -> dict[str, float]:
    """Median, 99th percentile and most."""
    ordered = sorted(values) or [0.0]
    return {"p50": statistics.median(ordered), "p99": ordered[math.ceil(len(ordered) * 0.99) - 1], "max": ordered[-1]}


@contextlib.contextmanager
def serving(model: str, *options: str) -> Iterator[str]:
    """The address of `paceline serve` on a free port, in a process of its own, ready, while the block runs."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    command = [sys.executable, "-m", "paceline", "serve", model, "--port", str(port), *options]
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(command) as process:
        try:
            while not _ready(url):
                if process.poll() is not None:
                    sys.exit("the server did not start; what it said is above")
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
    """Prints the result as the last line, in JSON."""
    print(json.dumps({**result, "machine": machine()}))
