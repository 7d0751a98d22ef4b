"""The tensors that hold keys and values on a device."""

from __future__ import annotations

import math

import numpy
import torch
from torch import Tensor


class KVCache:
    """Keys and values of every layer by slot; slot = page * page_size + offset.

    `data` is [layers, 2, pages * page_size, kv_heads, dim]. Page 0 is never allocated: padding and whatever runs past a
    request's pages write there, and nothing reads it.
    """

    def __init__(
        self,
        num_layers: int,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.page_size = page_size
        self.num_pages = num_pages
        shape = (num_layers, 2, num_pages * page_size, num_kv_heads, head_dim)
        self.data = _zeros(shape, dtype) if device.type == "cpu" else torch.zeros(shape, dtype=dtype, device=device)
        self._layers = [
            (layer[0], layer[1]) for layer in self.data
        ]  # a view costs more than the work of a small step's op

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, [slots, kv_heads, dim] each."""
        return self._layers[index]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros in memory that the system gives as it is written to; torch would write all of it at once."""
    count = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(numpy.zeros(count, numpy.uint8)).view(dtype).view(shape)


def page_bytes(num_layers: int, page_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of one page over all layers, keys and values."""
    return num_layers * 2 * page_size * num_kv_heads * head_dim * dtype.itemsize
