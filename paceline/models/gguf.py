"""Weights and metadata from a GGUF file under the Hugging Face names.

The header is read here: the `gguf` library takes seconds for a large vocabulary. A file is magic, version, counts, metadata,
tensor infos, padding, data.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from paceline.errors import BadWeights
from paceline.models.config import Family, ModelConfig
from paceline.models.families import WHOLE, family_by, from_gguf
from paceline.models.stored import BlockTensor, PlainTensor, StoredTensor, decoded
from paceline.ops.quantised import FORMATS, decode

_MOST_PARTS = 99_999  # what five digits of a file's name can count
_ROPE_DIVISORS = "rope_freqs.weight"  # Llama 3.1's stretch, as a divisor for each frequency


@dataclass(frozen=True)
class _Info:
    """Where a tensor lies in a file. `shape` is torch's (GGUF writes it reversed); `start` and `size` are bytes."""

    data: mmap.mmap
    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    size: int


class GGUFFile:
    """An open GGUF file, or all files of a split one, whichever of its parts `path` is. `paths` are the files.

    Raises BadWeights where one is no GGUF, is cut short, or holds a quantisation not in `ops.quantised.FORMATS` or a tensor
    that the model has no place for, and where parts are missing.
    """

    def __init__(self, path: Path) -> None:
        headers = _opened(path)
        self.paths = [header.path for header in headers]
        self.metadata = headers[0].metadata
        found = {tensor.name: tensor for header in headers for tensor in header.tensors}
        if len(found) < sum(len(header.tensors) for header in headers):
            raise BadWeights(f"{path} is damaged: it names a tensor twice")
        divisors = _vector(found.pop(_ROPE_DIVISORS)) if _ROPE_DIVISORS in found else ()
        self.config: ModelConfig = from_gguf(self.metadata, "output.weight" in found, divisors)
        self._family = family_by("name", self.config.family)
        self._infos = {_name(name, self._family): tensor for name, tensor in found.items()}

    def stored(self) -> Iterator[tuple[str, StoredTensor]]:
        """(Hugging Face name, tensor) in the file's order; a tensor of all experts as one of each."""
        heads = (
            {"attn_q": self.config.num_heads, "attn_k": self.config.num_kv_heads} if self._family.permuted_gguf else {}
        )
        for name, info in self._infos.items():
            part = info.name.split(".")[2] if info.name.startswith("blk.") else ""
            if "{expert}" in name:
                for expert, each in enumerate(_experts(info)):
                    yield name.replace("{expert}", str(expert)), _stored(each, 0)
            else:
                yield name, _stored(info, heads.get(part, 0))

    def tensors(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, CPU tensor of `dtype`) in the file's order, decoded a few tensors ahead of the caller."""
        return decoded(self.stored(), dtype)


def _stored(info: _Info, heads: int) -> StoredTensor:
    """The tensor; of `heads` attention heads whose rows the file interleaves, unless that is 0."""
    if len(info.shape) > 2:
        raise BadWeights(f"tensor {info.name!r} has {len(info.shape)} axes, not 1 or 2")
    rows = info.shape[0]
    if heads and rows % (2 * heads):
        raise BadWeights(f"tensor {info.name!r} has {rows} rows, which {heads} heads cannot share")
    data = torch.frombuffer(info.data, dtype=torch.uint8, offset=info.start, count=info.size)
    if len(info.shape) == 1 and FORMATS[info.kind].per_block > 1:
        return PlainTensor(decode(data[None], info.kind)[0])
    return BlockTensor(data.view(rows, -1), info.kind, info.shape, rows // heads if heads else 0)


def _experts(info: _Info) -> Iterator[_Info]:
    """The matrix of each expert, of a tensor [experts, rows, columns]."""
    if len(info.shape) != 3:
        raise BadWeights(f"tensor {info.name!r} of all experts has {len(info.shape)} axes, not 3")
    size = info.size // info.shape[0]
    for expert in range(info.shape[0]):
        yield replace(info, shape=info.shape[1:], start=info.start + expert * size, size=size)


def _vector(info: _Info) -> list[float]:
    return list(_stored(replace(info, shape=(math.prod(info.shape),)), 0).decode(torch.float32).tolist())


def _opened(path: Path) -> list[_Header]:
    """The headers of a file, or of all parts of a split one in their order; the first has the model's metadata."""
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
    expected, held = headers[0].metadata.get("split.tensors.count"), sum(len(each.tensors) for each in headers)
    if expected not in (None, held):
        raise BadWeights(f"the parts of {stem} hold {held} tensors, not {expected}")
    return headers


_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class _Header:
    """Reads a file's header. Every length in it is checked against the file's size before it is used."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise BadWeights(f"{path} is not a GGUF file")
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.path, self._at = path, 4
        try:
            self.metadata, self.tensors = self._read()
        except (struct.error, UnicodeDecodeError, RecursionError) as error:
            raise BadWeights(f"{path} is cut short or damaged: {error}") from error

    def _read(self) -> tuple[dict[str, Any], list[_Info]]:
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

    def _placed(self, base: int, name: str, shape: list[int], number: int, offset: int) -> _Info:
        kind = Kind(number).name if number in {each.value for each in Kind} else f"type {number}"
        if kind not in FORMATS:
            raise BadWeights(f"tensor {name!r} is {kind}; known: {', '.join(FORMATS)}")
        form = FORMATS[kind]
        if not shape or not all(shape) or shape[-1] % form.per_block:
            raise BadWeights(f"{self.path} is damaged: {name!r} is {kind} with the shape {shape}")
        start, size = base + offset, math.prod(shape) // form.per_block * form.block_bytes
        if start + size > len(self._data):
            raise BadWeights(f"{self.path} is cut short: {name!r} ends beyond its {len(self._data)} bytes")
        return _Info(self._data, name, kind, tuple(shape), start, size)

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
        """`count`, after a check that the file has room for that many items of at least `size` bytes."""
        if count * size > len(self._data) - self._at:
            raise BadWeights(f"{self.path} is cut short or damaged: a length in its header points beyond its end")
        return count


def _name(name: str, family: Family) -> str:
    """The Hugging Face name of a tensor; with {expert} where the tensor is that of all experts."""
    whole = {gguf: hf for hf, gguf in WHOLE.values()}
    parts = {gguf: hf for hf, gguf in family.names.values()}
    stem, _, ending = name.rpartition(".")
    if stem in whole and ending == "weight":
        return f"{whole[stem]}.weight"
    split = name.split(".")
    if len(split) == 4 and split[0] == "blk" and split[2] in parts:
        return f"model.layers.{split[1]}.{parts[split[2]]}.{split[3]}"
    raise BadWeights(f"the GGUF file has a tensor {name!r} that this model has no place for")
