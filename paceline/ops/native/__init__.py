"""Kernels in C for bfloat16 on CPUs that multiply it (AVX512-BF16), or else multiply float32 in vectors of 8 (AVX2).

Not on those with AMX, or with AVX-512 but no bfloat16: oneDNN serves them. The library is built once per machine by its
own `cc` and kept in the cache. Where that fails, one line of the log says why and the implementations in torch run instead.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from paceline.env import cache_dir

_SOURCES = [Path(__file__).with_name(name) for name in ("kernels.h", "avx512.h", "avx2.h", "product.c", "attention.c")]
_COMPILED = [source for source in _SOURCES if source.suffix == ".c"]
_AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
_AVX2 = {"avx2", "fma"}
_COMPILE = ["-O3", "-march=native", "-ffp-contract=off", "-fopenmp", "-fPIC", "-std=gnu11"]
_POINTER, _SIZE, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
_SIGNATURES = {
    "pack": [_POINTER, _POINTER, _SIZE, _SIZE, _SIZE, _INT],
    "product": [_POINTER, _POINTER, _POINTER, _FLOAT, _POINTER, _POINTER, _SIZE, _INT],
    "argmax": [_POINTER, _SIZE, _SIZE, _POINTER, _INT],
    "rope_and_cache": [*[_POINTER] * 8, _FLOAT, _POINTER, *[_SIZE] * 4, _INT],
    "paged_attention": [*[_POINTER] * 4, _FLOAT, *[_SIZE] * 3, _POINTER, _INT],
}


class Unavailable(Exception):
    """Why the native kernels cannot be used here, in a few words."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels; None where they are not supported or cannot be built, after one line in the log that says why."""
    try:
        path = build(cache_dir() / "native")
        loaded = ctypes.CDLL(str(path))
    except (Unavailable, OSError) as error:
        logging.getLogger(__name__).warning("no native CPU kernels, torch's serve instead: %s", error)
        return None
    for name, arguments in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, None
    return loaded


def build(directory: Path) -> Path:
    """The library's file in `directory`, compiled if it is not there. Raises Unavailable where that fails.

    It is linked without an OpenMP library and uses the one that torch has loaded: two thread pools that both wait by spinning
    would halve each other's speed.
    """
    flags = processor_flags()
    compiler = shutil.which("cc")
    if compiler is None:
        raise Unavailable("there is no C compiler (cc)")
    version = _run([compiler, "--version"])
    identity = "\n".join([*(source.read_text() for source in _SOURCES), " ".join(_COMPILE), version, *sorted(flags)])
    path = directory / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.so"
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            linked = os.path.join(scratch, "kernels.so")
            objects = [os.path.join(scratch, f"{source.stem}.o") for source in _COMPILED]
            for source, compiled in zip(_COMPILED, objects, strict=True):
                _run([compiler, *_COMPILE, "-c", str(source), "-o", compiled])
            _run([compiler, "-shared", *objects, "-o", linked])
            os.replace(linked, path)  # atomic: another process may build the same file at this moment
    return path


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["nothing said"])[0]
        raise Unavailable(f"{Path(command[0]).name} failed: {said}")
    return done.stdout


def processor_flags() -> set[str]:
    """The processor's feature flags. Raises Unavailable where these kernels do not support it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if platform.machine() == "x86_64" and info.exists() else []
    flags = set(next((line for line in lines if line.startswith("flags")), "").split())
    if not flags >= _AVX2:
        raise Unavailable("the processor has neither AVX512-BF16 nor AVX2 with FMA")
    if flags >= _AVX512 and "avx512_bf16" not in flags:
        raise Unavailable("the processor has AVX-512 without bfloat16, for which oneDNN has kernels")
    if "amx_bf16" in flags:
        raise Unavailable("the processor has AMX, which oneDNN uses well")
    return flags


class _WeightRecord(ctypes.Structure):
    """weight_t of product.c."""

    _fields_ = (("panels", _POINTER), ("bias", _POINTER), ("rows", _SIZE), ("columns", _SIZE), ("gated", _SIZE))


class Panels:
    """A weight in the kernels' layout. `address` is passed to them; `width` is the number of columns of its product.

    Of a gated weight (gate's rows, then up's) the product is silu(gate) * up, half as wide.
    """

    def __init__(self, matrix: Tensor, bias: Tensor | None, gated: bool, kernels: ctypes.CDLL) -> None:
        rows, columns = matrix.shape
        matrix = matrix.contiguous()
        self.gated, self.columns = gated, columns
        self.width = rows // 2 if gated else rows
        panels = -(-self.width // (32 if gated else 64))
        self._panels = torch.empty(panels * -(-columns // 2) * 128, dtype=torch.bfloat16)
        self._bias = None if bias is None else _padded_bias(bias.float(), gated, panels)
        kernels.pack(matrix.data_ptr(), self._panels.data_ptr(), rows, columns, gated, torch.get_num_threads())
        bias_address = None if self._bias is None else self._bias.data_ptr()
        self._record = _WeightRecord(self._panels.data_ptr(), bias_address, rows, columns, gated)
        self.address = ctypes.addressof(self._record)


def _padded_bias(bias: Tensor, gated: bool, panels: int) -> Tensor:
    """The bias in the order of the panels' columns, 64 each."""
    if not gated:
        return torch.nn.functional.pad(bias, (0, panels * 64 - len(bias)))
    halves = torch.nn.functional.pad(bias.view(2, -1), (0, panels * 32 - len(bias) // 2))
    return halves.view(2, panels, 32).transpose(0, 1).contiguous().flatten()


def pack(matrix: Tensor, bias: Tensor | None, gated: bool) -> Panels | None:
    """The weight packed for the kernels; None where they do not support it."""
    if matrix.device.type != "cpu" or matrix.dtype != torch.bfloat16:
        return None
    kernels = library()
    return None if kernels is None else Panels(matrix, bias, gated, kernels)
