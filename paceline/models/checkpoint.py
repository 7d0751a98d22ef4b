"""A model on disk: a GGUF file, or a directory with config.json, safetensors and tokenizer.json."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from paceline.errors import BadWeights, UnknownModel
from paceline.models import sampling
from paceline.models.config import ModelConfig
from paceline.models.families import from_hf
from paceline.models.gguf import GGUFFile
from paceline.models.stored import SafeTensor, StoredTensor, decoded
from paceline.models.tokenizer import Tokenizer
from paceline.types import Sampling

_log = logging.getLogger(__name__)


class Checkpoint(ABC):
    """A model's config, weights and tokenizer, and the sampling that its makers recommend (greedy where they name none).

    `identity` is a digest of the files' sizes, of their first megabyte and of samples from all over them: cheap, and no
    proof that every weight is the same.
    """

    config: ModelConfig
    identity: str
    sampling: Sampling

    @abstractmethod
    def stored(self) -> Iterator[tuple[str, StoredTensor]]:
        """(Hugging Face name, tensor as it is stored), each once; nothing is decoded yet."""

    def tensors(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, CPU tensor of `dtype`), each once, decoded a few tensors ahead of the caller."""
        return decoded(self.stored(), dtype)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer, its `eos_tokens` limited to the model's vocabulary. Logs a warning where none is left."""
        tokenizer = self._tokenizer()
        tokenizer.eos_tokens = tuple(each for each in tokenizer.eos_tokens if 0 <= each < self.config.vocab_size)
        if not tokenizer.eos_tokens:
            _log.warning(
                "this model names no token that ends its output: it goes on to the limit, or to a stop string of the request"
            )
        return tokenizer

    @abstractmethod
    def _tokenizer(self) -> Tokenizer: ...


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens what is at `path`. Raises UnknownModel where there is no model, BadWeights where it is damaged."""
    if path.is_dir():
        return _Directory(path)
    if path.is_file():
        return _GGUF(path)
    raise UnknownModel(f"there is no model at {path}")


class _GGUF(Checkpoint):
    def __init__(self, path: Path) -> None:
        self._file = GGUFFile(path)
        self.config = self._file.config
        self.identity = _identity(self._file.paths)
        self.sampling = sampling.from_gguf(self._file.metadata)

    def stored(self) -> Iterator[tuple[str, StoredTensor]]:
        return self._file.stored()

    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.from_gguf(self._file.metadata)


class _Directory(Checkpoint):
    def __init__(self, path: Path) -> None:
        self._path = path
        self._files = self._weight_files()
        if not self._files:
            others = [each.name for each in sorted(path.glob("*.gguf"))[:1]]
            hint = f"; for its GGUF file, give the path of that: {path / others[0]}" if others else ""
            raise BadWeights(f"{path} holds no safetensors file{hint}")
        values = self._json("config.json")
        if values is None:
            raise BadWeights(f"{path} holds no config.json")
        generation = self._json("generation_config.json") or {}
        values["eos_token_id"] = [*_listed(generation.get("eos_token_id")), *_listed(values.get("eos_token_id"))]
        self.config = from_hf(values)
        self.sampling = sampling.from_generation_config(generation)
        self._check_files()
        self.identity = _identity([path / "config.json", *self._files])

    def stored(self) -> Iterator[tuple[str, StoredTensor]]:
        for file in self._files:
            try:
                opened = safe_open(file, framework="pt")
            except SafetensorError as error:
                raise BadWeights(f"{file} is cut short or damaged: {error}") from error
            for name in opened.keys():  # noqa: SIM118 - the handle itself cannot be iterated
                yield name, SafeTensor(file, opened, name)

    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.from_directory(self._path, self.config.eos_tokens)

    def _weight_files(self) -> list[Path]:
        """The files that the index lists, where there is one (others may lie beside them), else all safetensors files."""
        index = self._json("model.safetensors.index.json")
        if index is None:
            files = sorted(self._path.glob("*.safetensors"))
            names = {name for file in files for name in _shards(file.name)}
        else:
            listed = index.get("weight_map")
            if not isinstance(listed, dict) or not listed:
                raise BadWeights(f"{self._path / 'model.safetensors.index.json'} lists no weights")
            names = {str(each) for each in listed.values()}
            files = [self._path / name for name in sorted(names)]
        missing = sorted(name for name in names if not (self._path / name).is_file())
        if missing:
            raise BadWeights(
                f"{self._path} lacks {', '.join(missing)} of the {len(names)} files of the model's weights"
            )
        return files

    def _check_files(self) -> None:
        """Opens each file once: the library compares its header with its length. A tensor's name may occur once only."""
        found: set[str] = set()
        for file in self._files:
            try:
                with safe_open(file, framework="pt") as opened:
                    names = set(opened.keys())
            except (SafetensorError, OSError) as error:
                raise BadWeights(f"{file} is cut short or damaged: {error}") from error
            if found & names:
                raise BadWeights(f"{file} holds {min(found & names)!r}, which another file holds too")
            found |= names

    def _json(self, name: str) -> dict[str, Any] | None:
        file = self._path / name
        if not file.exists():
            return None
        try:
            values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise BadWeights(f"{file} is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise BadWeights(f"{file} is no JSON object")
        return values


def _shards(name: str) -> list[str]:
    """The names of all files that belong together with a file of weights, read off its own name."""
    found = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.safetensors", name)
    if not found:
        return [name]
    return [f"{found[1]}-{number:05}-of-{found[2]}.safetensors" for number in range(1, int(found[2]) + 1)]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


_HEAD, _SAMPLE, _NUM_SAMPLES = 1 << 20, 4096, 256


def _identity(files: list[Path]) -> str:
    """A digest over each file's size, first megabyte, and 4 KB at 256 places spread over it to its end.

    The first megabyte alone does not suffice: two fine-tunes of one model have the same sizes, shapes and vocabulary.
    """
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with file.open("rb") as opened:
            digest.update(opened.read(_HEAD))
            for number in range(_NUM_SAMPLES if size > _HEAD else 0):
                opened.seek((size - _SAMPLE) * number // (_NUM_SAMPLES - 1))
                digest.update(opened.read(_SAMPLE))
    return digest.hexdigest()
