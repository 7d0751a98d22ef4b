"""Block formats of stored weights, under GGUF's names, and the torch functions that decode them to numbers.

Results are bit for bit those of the `gguf` library. A row of a matrix is a whole number of blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockFormat:
    """`decode` takes [N, block_bytes] uint8 and gives [N, per_block] (of any shape with as many values) in `dtype`."""

    per_block: int
    block_bytes: int
    decode: Callable[[Tensor], Tensor]
    dtype: torch.dtype = torch.float32


def decode(data: Tensor, kind: str) -> Tensor:
    """Whole rows of blocks, [R, bytes] uint8, as [R, columns] in the format's own dtype. `kind` is a key of FORMATS."""
    form = FORMATS[kind]
    return form.decode(data.reshape(-1, form.block_bytes)).view(len(data), -1)


def _plain(dtype: torch.dtype) -> BlockFormat:
    # a copy first: the bytes of a file may lie at any address
    return BlockFormat(1, dtype.itemsize, lambda blocks: blocks.clone().view(dtype), dtype)


def _half(blocks: Tensor, first: int) -> Tensor:
    """The float16 at bytes first and first + 1 of each block, [N, 1] float32."""
    return blocks[:, first : first + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """[N, 16] bytes -> [N, 2, 16] float32: the low 4 bits of all bytes, then the high 4 bits."""
    values = torch.empty(len(packed), 2, packed.shape[1], device=packed.device)
    values[:, 0] = packed & 15
    values[:, 1] = packed >> 4
    return values


def _q4_0(blocks: Tensor) -> Tensor:
    """[N, 18] bytes -> [N, 2, 16]: a scale and 32 values of 4 bits, offset by 8."""
    return _nibbles(blocks[:, 2:]).sub_(8).mul_(_half(blocks, 0)[:, :, None])


def _q4_1(blocks: Tensor) -> Tensor:
    """[N, 20] bytes -> [N, 2, 16]: a scale, a minimum and 32 values of 4 bits."""
    return _nibbles(blocks[:, 4:]).mul_(_half(blocks, 0)[:, :, None]).add_(_half(blocks, 2)[:, :, None])


def _q8_0(blocks: Tensor) -> Tensor:
    """[N, 34] bytes -> [N, 32]: a scale and 32 values of 8 bits."""
    return blocks[:, 2:].view(torch.int8).float().mul_(_half(blocks, 0))


def _q4_k(blocks: Tensor) -> Tensor:
    """[N, 144] bytes -> [N, 8, 32]: two halves, 8 scales and 8 minima of 6 bits in 12 bytes, 256 values of 4 bits."""
    halves = blocks[:, :4].contiguous().view(torch.float16).float()
    low, middle, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = torch.cat([low & 63, (high & 15) | (low >> 6 << 4)], dim=1).float().mul_(halves[:, :1])
    minimum = torch.cat([middle & 63, (high >> 4) | (middle >> 6 << 4)], dim=1).float().mul_(halves[:, 1:])
    values = _nibbles(blocks[:, 16:].reshape(-1, 32)).view(-1, 8, 32)
    return values.mul_(scale[:, :, None]).sub_(minimum[:, :, None])


def _q6_k(blocks: Tensor) -> Tensor:
    """[N, 210] bytes -> [N, 16, 16]: the low 4 bits of 256 values, their high 2 bits, 16 scales of 8 bits, one half."""
    low, high = blocks[:, :128].reshape(-1, 2, 2, 32), blocks[:, 128:192].reshape(-1, 2, 32)
    scale = blocks[:, 192:208].view(torch.int8).float() * _half(blocks, 208)
    bits = torch.empty(len(blocks), 2, 4, 32, dtype=torch.uint8, device=blocks.device)
    for quarter in range(4):
        nibbles = low[:, :, quarter % 2]
        nibbles = nibbles & 15 if quarter < 2 else nibbles >> 4
        bits[:, :, quarter] = nibbles | (high >> 2 * quarter & 3) << 4
    return bits.float().sub_(32).view(-1, 16, 16).mul_(scale[:, :, None])


FORMATS: dict[str, BlockFormat] = {
    "F32": _plain(torch.float32),
    "F16": _plain(torch.float16),
    "BF16": _plain(torch.bfloat16),
    "Q4_0": BlockFormat(32, 18, _q4_0),
    "Q4_1": BlockFormat(32, 20, _q4_1),
    "Q8_0": BlockFormat(32, 34, _q8_0),
    "Q4_K": BlockFormat(256, 144, _q4_k),
    "Q6_K": BlockFormat(256, 210, _q6_k),
}
