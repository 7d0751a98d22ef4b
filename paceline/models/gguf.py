"""Weights and metadata from a GGUF file, dequantised through the `gguf` library, under the Hugging Face names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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
_SLICE = 4_000_000  # weights dequantised at a time: a slice's float32 stays in the cache's reach, and threads share big ones

_WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
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


class GGUFFile:
    """An open GGUF file. Raises BadWeights where it is no GGUF, is cut short, or holds a quantisation not in KINDS."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise BadWeights(f"{path} is not a GGUF file")
        try:
            self._reader = gguf.GGUFReader(path)
        except (ValueError, IndexError, KeyError, UnicodeDecodeError, TypeError) as error:
            raise BadWeights(f"{path} is cut short or damaged: {error}") from error
        size = path.stat().st_size
        for tensor in self._reader.tensors:
            if tensor.tensor_type not in KINDS:
                known = ", ".join(kind.name for kind in KINDS)
                raise BadWeights(f"tensor {tensor.name!r} is {tensor.tensor_type.name}; known: {known}")
            if tensor.data_offset + tensor.n_bytes > size:
                raise BadWeights(f"{path} is cut short: {tensor.name!r} ends beyond its {size} bytes")
        self.metadata: dict[str, Any] = {name: field.contents() for name, field in self._reader.fields.items()}
        self.config: ModelConfig = from_gguf(
            self.metadata, any(tensor.name == "output.weight" for tensor in self._reader.tensors)
        )

    def tensors(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, tensor) in the file's order, a few tensors ahead of the caller on every core."""
        family = next(each for each in FAMILIES if each.name == self.config.family)
        heads = {"attn_q": self.config.num_heads, "attn_k": self.config.num_kv_heads}
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            pending = []
            for tensor in self._reader.tensors:
                shape = tensor.shape[::-1].tolist()
                result = torch.empty(shape, dtype=dtype)
                rows = max(1, _SLICE // shape[-1]) if len(shape) > 1 else shape[0]
                jobs = [
                    pool.submit(_fill, result, tensor.data, tensor.tensor_type, first, first + rows)
                    for first in range(0, shape[0], rows)
                ]
                part = tensor.name.split(".")[2] if tensor.name.startswith("blk.") else ""
                count = heads.get(part, 0) if family.permuted_gguf else 0
                pending.append((_name(tensor.name), result, jobs, count))
                if len(pending) > 16:
                    yield _finished(*pending.pop(0))
            for each in pending:
                yield _finished(*each)


def _fill(result: Tensor, data: numpy.ndarray[Any, Any], kind: Kind, first: int, last: int) -> None:
    values = numpy.require(gguf.dequantize(data[first:last], kind), requirements=["C", "W"])
    result[first:last] = torch.from_numpy(values).view(result[first:last].shape)


def _finished(name: str, result: Tensor, jobs: list[Any], heads: int) -> tuple[str, Tensor]:
    for job in jobs:
        job.result()
    if heads:
        # GGUF pairs the halves of each head for its own rotary form; transformers keeps them apart
        shape = result.shape
        result = result.view(heads, shape[0] // heads // 2, 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
    return name, result


def _name(name: str) -> str:
    if name in _WHOLE:
        return _WHOLE[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER:
        return f"model.layers.{parts[1]}.{_LAYER[parts[2]]}.{parts[3]}"
    raise BadWeights(f"the GGUF file has a tensor {name!r} that this model has no place for")
