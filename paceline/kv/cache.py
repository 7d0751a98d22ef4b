"""The device tensors of a cache layout."""

from __future__ import annotations

import itertools
import math

import numpy
import torch
from torch import Tensor

from paceline.errors import ConfigError
from paceline.kv.layout import CacheLayout, Plane
from paceline.ops.move import move_rows


class KVCache:
    """Every plane of a layout: paged planes by location, per-request planes by slot.

    A location is a token's place, page * page_size + offset. Page 0 is never allocated: padding and whatever runs past a
    request's pages write there, and nothing reads it.
    """

    def __init__(self, layout: CacheLayout, num_pages: int, num_slots: int, device: torch.device) -> None:
        """`num_slots` requests may hold state at a time, padding's slot included. Memory starts as zeros."""
        self.layout = layout
        self.page_size = layout.page_size
        self.num_pages = num_pages
        self.device = device
        self._views: dict[str, list[Tensor]] = {}
        num_locations = num_pages * layout.page_size
        # planes of equal rows share one tensor [layers of all, locations, *shape], so that a copy is one launch
        self._paged = [
            self._allocate(list(planes), num_locations)
            for _, planes in itertools.groupby(layout.paged, lambda plane: (plane.shape, plane.dtype))
        ]
        for plane in layout.per_request:
            self._allocate([plane], num_slots)

    def plane(self, name: str, layer: int) -> Tensor:
        """One layer of a plane: [locations, *shape] of a paged one, [slots, *shape] of a per-request one."""
        return self._views[name][layer]

    def read(self, pages: list[int]) -> Tensor:
        """A copy of whole pages, [len(pages), page_bytes] uint8 on the device, as `write` takes them."""
        index = torch.tensor(pages, dtype=torch.int64, device=self.device)
        parts = [group[:, index].transpose(0, 1).flatten(1) for group in map(self._by_page, self._paged)]
        return torch.cat(parts, dim=1)

    def write(self, pages: list[int], data: Tensor) -> None:
        """Fills pages with what `read` gave, [len(pages), page_bytes] uint8. Raises ConfigError for another shape."""
        if data.shape != (len(pages), self.layout.page_bytes) or data.dtype != torch.uint8:
            expected = [len(pages), self.layout.page_bytes]
            raise ConfigError(f"pages of this cache are {expected} bytes; got {list(data.shape)} of {data.dtype}")
        index = torch.tensor(pages, dtype=torch.int64, device=self.device)
        start = 0
        for group in map(self._by_page, self._paged):
            layers, _, size = group.shape
            part = data[:, start : start + layers * size].to(self.device)
            group[:, index] = part.view(len(pages), layers, size).transpose(0, 1)
            start += layers * size

    def move(self, page_table: Tensor, context_lens: Tensor, counts: Tensor, path: Tensor) -> None:
        """Moves accepted tokens of a step to where plain decoding would have put them; see `ops.move.move_rows`."""
        for group in self._paged:
            move_rows(group.view(*group.shape[:2], -1), page_table, context_lens, counts, path, self.page_size)

    def _allocate(self, planes: list[Plane], rows: int) -> Tensor:
        shape, dtype = planes[0].shape, planes[0].dtype
        whole = (sum(plane.layers for plane in planes), rows, *shape)
        data = (
            _zeros(whole, dtype) if self.device.type == "cpu" else torch.zeros(whole, dtype=dtype, device=self.device)
        )
        layers = iter(data)
        for plane in planes:  # views are made once: making one costs more than the work of a small step's op
            self._views[plane.name] = list(itertools.islice(layers, plane.layers))
        return data

    def _by_page(self, group: Tensor) -> Tensor:
        """[layers, pages, bytes of a page in one layer] uint8."""
        layers = group.shape[0]
        return group.view(layers, self.num_pages, -1).view(torch.uint8)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros in memory that the system provides as it is written to; torch would write all of it at once."""
    count = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(numpy.zeros(count, numpy.uint8)).view(dtype).view(shape)
