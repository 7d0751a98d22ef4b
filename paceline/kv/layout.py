"""The layout of cached state, as data. Models and drafters declare it; whatever allocates or copies pages reads it alone."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch

from paceline.errors import ConfigError


@dataclass(frozen=True)
class Plane:
    """One kind of cached state: for each of `layers` layers a tensor of `shape` and `dtype`, per token or per request.

    Examples: the keys of grouped-query attention, (num_kv_heads, head_dim) per token; the compressed KV of latent
    attention, (rank + rope_dim,) per token; the recurrent state of a delta rule, (heads, dim, dim) per request. With tensor
    parallelism the shape is that of this rank's shard.
    """

    name: str
    layers: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.layers < 1 or not all(each >= 1 for each in self.shape):
            raise ConfigError(f"the cache plane {self.name!r} has {self.layers} layers of shape {self.shape}")

    @property
    def row_bytes(self) -> int:
        """Bytes of one token (or request) in one layer."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class CacheLayout:
    """The planes kept per token, in pages of `page_size` tokens, and those kept per request.

    Models and drafters each give one; `join` makes the cache's. Raises ConfigError for two planes of one name.
    """

    page_size: int
    paged: tuple[Plane, ...] = ()
    per_request: tuple[Plane, ...] = ()

    def __post_init__(self) -> None:
        names = [plane.name for plane in self.paged + self.per_request]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"the cache layout has two planes named {twice[0]!r}")

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all paged planes and layers."""
        return self.page_size * sum(plane.layers * plane.row_bytes for plane in self.paged)

    @property
    def request_bytes(self) -> int:
        """Bytes of one request's slot over all per-request planes and layers."""
        return sum(plane.layers * plane.row_bytes for plane in self.per_request)

    def join(self, other: CacheLayout) -> CacheLayout:
        """A layout with the planes of both. Raises ConfigError where page sizes differ or a name occurs twice."""
        if other.page_size != self.page_size:
            raise ConfigError(f"cache layouts of page sizes {self.page_size} and {other.page_size} cannot be joined")
        return CacheLayout(self.page_size, self.paged + other.paged, self.per_request + other.per_request)

    def digest(self) -> str:
        """Hexadecimal SHA-256 of everything that decides what the bytes of a page mean, the order of planes included."""
        planes = [
            f"{kind} {plane.name} {plane.layers} {plane.shape} {plane.dtype}"
            for kind, group in (("paged", self.paged), ("request", self.per_request))
            for plane in group
        ]
        return hashlib.sha256("\n".join([f"page_size {self.page_size}", *planes]).encode()).hexdigest()
