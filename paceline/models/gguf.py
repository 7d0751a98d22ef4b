"""Weights and metadata from a GGUF file under the Hugging Face names.

The header is read here (the `gguf` library takes seconds for a large vocabulary), and the two common quantisations,
Q4_K and Q6_K, are undone here in torch; the rest is the library's. A file is magic, version, counts, metadata, tensor
infos, padding, data.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from paceline.errors import BadWeights
from paceline.models.config import FAMILIES, ModelConfig, from_gguf

KINDS = (Kind.F32, Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q8_0, Kind.Q4_K, Kind.Q6_K)
_SLICE = 1_000_000  # weights dequantised at a time: few enough for the caches, and threads share large tensors
_MOST_PARTS = 99_999  # what five digits of a file's name can count
_AHEAD = 16  # tensors in work before the caller has taken them

_WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_ROPE_DIVISORS = "rope_freqs.weight"  # Llama 3.1's stretch, as a divisor for each frequency
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies in a file. `shape` is torch's (GGUF writes it reversed); `start` and `size` are bytes."""

    data: mmap.mmap
    name: str
    kind: Kind
    shape: tuple[int, ...]
    start: int
    size: int


class GGUFFile:
    """An open GGUF file, or all files of a split one, whichever of its parts `path` is. `paths` are the files.

    Raises BadWeights where one is no GGUF, is cut short, or holds a quantisation not in KINDS or a tensor that the model
    has no place for, and where parts are missing.
    """

    def __init__(self, path: Path) -> None:
        headers = _opened(path)
        self.paths = [header.path for header in headers]
        self.metadata = headers[0].metadata
        found = {tensor.name: tensor for header in headers for tensor in header.stored}
        if len(found) < sum(len(header.stored) for header in headers):
            raise BadWeights(f"{path} is damaged: it names a tensor twice")
        divisors = _vector(found.pop(_ROPE_DIVISORS)) if _ROPE_DIVISORS in found else ()
        self.config: ModelConfig = from_gguf(self.metadata, "output.weight" in found, divisors)
        self._stored = {_name(name): tensor for name, tensor in found.items()}

    def tensors(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, tensor) in the file's order, a few tensors ahead of the caller on every core.

        While this runs, threads that use torch for the first time start with one intra-operation thread.
        """
        family = next(each for each in FAMILIES if each.name == self.config.family)
        heads = {"attn_q": self.config.num_heads, "attn_k": self.config.num_kv_heads}
        threads = torch.get_num_threads()
        pool = ThreadPoolExecutor(os.cpu_count() or 1, initializer=torch.set_num_threads, initargs=(1,))
        try:
            pending: list[tuple[str, Tensor, list[Future[None]], int]] = []
            for name, stored in self._stored.items():
                part = stored.name.split(".")[2] if stored.name.startswith("blk.") else ""
                count = heads.get(part, 0) if family.permuted_gguf else 0
                result = torch.empty(stored.shape, dtype=dtype)
                pending.append((name, result, _submit(pool, stored, result), count))
                if len(pending) > _AHEAD:
                    yield _finished(*pending.pop(0))
            while pending:
                yield _finished(*pending.pop(0))
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)


def _bytes_of(stored: _Stored) -> Tensor:
    return torch.frombuffer(stored.data, dtype=torch.uint8, offset=stored.start, count=stored.size)


def _vector(stored: _Stored) -> list[float]:
    values = torch.empty(1, math.prod(stored.shape))
    dequantize(_bytes_of(stored)[None], stored.kind, values)
    return list(values[0].tolist())


def _opened(path: Path) -> list[_Header]:
    """The heads of a file, or of all parts of a split one in their order; the first has the model's metadata."""
    header = _Header(path)
    number, count = header.metadata.get("split.no", 0), header.metadata.get("split.count", 1)
    if count in (0, 1):
        return [header]
    if not (isinstance(count, int) and isinstance(number, int) and 0 <= number < count <= _MOST_PARTS):
        raise BadWeights(f"{path} is damaged: it is part {number!r} of {count!r}")
    part = f"{path} is part {number + 1} of {count} of a split GGUF file"
    ending = f"-{number + 1:05}-of-{count:05}.gguf"
    if not path.name.endswith(ending):
        raise BadWeights(f"{part}; the others can be found only where its name ends in {ending}")
    stem = path.name.removesuffix(ending)
    paths = [path.with_name(f"{stem}-{index + 1:05}-of-{count:05}.gguf") for index in range(count)]
    missing = [each.name for each in paths if not each.is_file()]
    if missing:
        raise BadWeights(f"{part}; {path.parent} lacks {', '.join(missing)}")
    headers = [header if each == path else _Header(each) for each in paths]
    for index, each in enumerate(headers):
        found = each.metadata.get("split.no"), each.metadata.get("split.count")
        if found != (index, count):
            raise BadWeights(f"{each.path} is not part {index + 1} of {count}, as its name says")
    expected, held = headers[0].metadata.get("split.tensors.count"), sum(len(each.stored) for each in headers)
    if expected not in (None, held):
        raise BadWeights(f"the parts of {stem} hold {held} tensors, not {expected}")
    return headers


_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class _Header:
    """Reads a file's head. Every length in it is checked against the file's before it is believed."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise BadWeights(f"{path} is not a GGUF file")
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.path, self._at = path, 4
        try:
            self.metadata, self.stored = self._read()
        except (struct.error, UnicodeDecodeError, RecursionError) as error:
            raise BadWeights(f"{path} is cut short or damaged: {error}") from error

    def _read(self) -> tuple[dict[str, Any], list[_Stored]]:
        version = self._scalar("I")
        if version not in (2, 3):
            raise BadWeights(f"{self.path} is GGUF of version {version}; versions 2 and 3 (little-endian) are known")
        num_tensors, num_values = self._scalar("Q"), self._scalar("Q")
        metadata: dict[str, Any] = {}
        for _ in range(self._count(num_values, 13)):
            name = self._string()
            metadata[name] = self._value(self._scalar("I"))
        infos = [self._info() for _ in range(self._count(num_tensors, 24))]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0:
            raise BadWeights(f"{self.path} is damaged: its alignment is {alignment!r}")
        base = math.ceil(self._at / alignment) * alignment
        return metadata, [self._placed(base, *info) for info in infos]

    def _info(self) -> tuple[str, list[int], int, int]:
        name = self._string()
        dimensions = [self._scalar("Q") for _ in range(self._count(self._scalar("I"), 8))]
        return name, dimensions[::-1], self._scalar("I"), self._scalar("Q")

    def _placed(self, base: int, name: str, shape: list[int], number: int, offset: int) -> _Stored:
        kind = Kind(number) if number in {each.value for each in Kind} else None
        if kind not in KINDS:
            known = ", ".join(each.name for each in KINDS)
            raise BadWeights(f"tensor {name!r} is {kind.name if kind else f'type {number}'}; known: {known}")
        per_block, block_size = gguf.GGML_QUANT_SIZES[kind]
        if not shape or not all(shape) or shape[-1] % per_block:
            raise BadWeights(f"{self.path} is damaged: {name!r} is {kind.name} with the shape {shape}")
        start, size = base + offset, math.prod(shape) // per_block * block_size
        if start + size > len(self._data):
            raise BadWeights(f"{self.path} is cut short: {name!r} ends beyond its {len(self._data)} bytes")
        return _Stored(self._data, name, kind, tuple(shape), start, size)

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalar(self._code(kind))
        inner, count = self._scalar("I"), self._scalar("Q")
        if inner == _STRING:
            return [self._string() for _ in range(self._count(count, 8))]
        if inner == _ARRAY:
            return [self._value(inner) for _ in range(self._count(count, 12))]
        layout = f"<{self._count(count, struct.calcsize(self._code(inner)))}{self._code(inner)}"
        values = list(struct.unpack_from(layout, self._data, self._at))
        self._at += struct.calcsize(layout)
        return values

    def _code(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise BadWeights(f"{self.path} is damaged: there is no metadata of type {kind}")
        return _SCALARS[kind]

    def _scalar(self, code: str) -> Any:
        [value] = struct.unpack_from("<" + code, self._data, self._at)
        self._at += struct.calcsize("<" + code)
        return value

    def _string(self) -> str:
        size = self._count(self._scalar("Q"), 1)
        self._at += size
        return self._data[self._at - size : self._at].decode("utf-8")

    def _count(self, count: int, size: int) -> int:
        """`count`, once it is sure that so many things of at least `size` bytes can follow."""
        if count * size > len(self._data) - self._at:
            raise BadWeights(f"{self.path} is cut short or damaged: a length in its head points beyond its end")
        return count


def _submit(pool: ThreadPoolExecutor, stored: _Stored, result: Tensor) -> list[Future[None]]:
    columns = stored.shape[-1]
    source = _bytes_of(stored).view(result.numel() // columns, -1)
    target = result.view(-1, columns)
    rows = max(1, _SLICE // columns)
    return [
        pool.submit(dequantize, source[first : first + rows], stored.kind, target[first : first + rows])
        for first in range(0, len(target), rows)
    ]


def dequantize(source: Tensor, kind: Kind, target: Tensor) -> None:
    """Whole rows of uint8 blocks [R, bytes] into `target` [R, columns] of any float type, rounded from float32."""
    _, block_size = gguf.GGML_QUANT_SIZES[kind]
    blocks = source.reshape(-1, block_size)
    if kind is Kind.Q4_K:
        values = _q4_k(blocks)
    elif kind is Kind.Q6_K:
        values = _q6_k(blocks)
    elif kind in _FLOATS:
        values = source.clone().view(_FLOATS[kind])
    else:
        values = torch.from_numpy(numpy.require(gguf.dequantize(source.numpy(), kind), requirements=["C", "W"]))
    target.copy_(values.view(target.shape))


_FLOATS = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}


def _q4_k(blocks: Tensor) -> Tensor:
    """[N, 144] bytes -> [N, 8, 32]: two halves, 8 scales and 8 minima of 6 bits in 12 bytes, 256 values of 4 bits."""
    halves = blocks[:, :4].contiguous().view(torch.float16).float()
    low, middle, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = torch.cat([low & 63, (high & 15) | (low >> 6 << 4)], dim=1).float().mul_(halves[:, :1])
    minimum = torch.cat([middle & 63, (high >> 4) | (middle >> 6 << 4)], dim=1).float().mul_(halves[:, 1:])
    nibbles = blocks[:, 16:].reshape(-1, 4, 32)
    values = torch.empty(len(blocks), 4, 2, 32)
    values[:, :, 0] = nibbles & 15
    values[:, :, 1] = nibbles >> 4
    return values.view(-1, 8, 32).mul_(scale[:, :, None]).sub_(minimum[:, :, None])


def _q6_k(blocks: Tensor) -> Tensor:
    """[N, 210] bytes -> [N, 16, 16]: the low 4 bits of 256 values, their high 2 bits, 16 scales of 8 bits, one half."""
    low, high = blocks[:, :128].reshape(-1, 2, 2, 32), blocks[:, 128:192].reshape(-1, 2, 32)
    scale = blocks[:, 192:208].view(torch.int8).float() * blocks[:, 208:].contiguous().view(torch.float16).float()
    bits = torch.empty(len(blocks), 2, 4, 32, dtype=torch.uint8)
    for quarter in range(4):
        nibbles = low[:, :, quarter % 2]
        nibbles = nibbles & 15 if quarter < 2 else nibbles >> 4
        bits[:, :, quarter] = nibbles | (high >> 2 * quarter & 3) << 4
    return bits.float().sub_(32).view(-1, 16, 16).mul_(scale[:, :, None])


def _finished(name: str, result: Tensor, jobs: list[Future[None]], heads: int) -> tuple[str, Tensor]:
    for job in jobs:
        job.result()
    if heads:
        shape = result.shape
        if shape[0] % (2 * heads):
            raise BadWeights(f"tensor {name!r} has {shape[0]} rows, which {heads} heads cannot share")
        # GGUF pairs the halves of each head for its own rotary form; transformers keeps them apart
        result = result.view(heads, shape[0] // heads // 2, 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
    return name, result


def _name(name: str) -> str:
    if name in _WHOLE:
        return _WHOLE[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER:
        return f"model.layers.{parts[1]}.{_LAYER[parts[2]]}.{parts[3]}"
    raise BadWeights(f"the GGUF file has a tensor {name!r} that this model has no place for")
