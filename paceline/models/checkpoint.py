"""A model on disk: a GGUF file, or a directory with config.json, safetensors and tokenizer.json."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from paceline.errors import BadWeights, UnknownModel
from paceline.models.config import ModelConfig, from_hf
from paceline.models.gguf import GGUFFile
from paceline.models.tokenizer import Tokenizer


class Checkpoint(ABC):
    """A model's config, weights and tokenizer.

    `identity` tells two checkpoints apart by their files' sizes, heads and samples all over them; it is cheap, and no
    proof that every weight is the same.
    """

    config: ModelConfig
    identity: str

    @abstractmethod
    def tensors(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, CPU tensor of `dtype`), each once."""

    @abstractmethod
    def tokenizer(self) -> Tokenizer: ...


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
        self.identity = _identity([path])

    def tensors(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        return self._file.tensors(dtype)

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_gguf(self._file.metadata)


class _Directory(Checkpoint):
    def __init__(self, path: Path) -> None:
        self._path = path
        self._files = self._weight_files()
        if not self._files:
            raise BadWeights(f"{path} holds no safetensors file")
        values = self._json("config.json")
        if values is None:
            raise BadWeights(f"{path} holds no config.json")
        generation = self._json("generation_config.json") or {}
        if generation.get("eos_token_id") is not None:
            values["eos_token_id"] = generation["eos_token_id"]
        self.config = from_hf(values)
        self._check_files()
        self.identity = _identity([path / "config.json", *self._files])

    def tensors(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        for file in self._files:
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 - the handle itself cannot be iterated
                        yield name, opened.get_tensor(name).to(dtype)
            except SafetensorError as error:
                raise BadWeights(f"{file} is cut short or damaged: {error}") from error

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_directory(self._path, self.config.eos_tokens)

    def _weight_files(self) -> list[Path]:
        """Those that the index lists, where there is one (other files may lie beside them), else all."""
        index = self._json("model.safetensors.index.json")
        if index is None:
            return sorted(self._path.glob("*.safetensors"))
        listed = index.get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise BadWeights(f"{self._path / 'model.safetensors.index.json'} lists no weights")
        files = [self._path / str(name) for name in sorted(set(listed.values()))]
        for file in files:
            if not file.is_file():
                raise BadWeights(f"{self._path} lacks {file.name}, which its index lists")
        return files

    def _check_files(self) -> None:
        """Opens each file once: the library compares its header with its length. A name may be there once only."""
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


_HEAD, _SAMPLE, _NUM_SAMPLES = 1 << 20, 4096, 256


def _identity(files: list[Path]) -> str:
    """A digest over each file's size, first megabyte, and 4 KB at 256 places spread over it to its end.

    The head alone would not do: two fine-tunes of one model have the same sizes, shapes and vocabulary.
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
