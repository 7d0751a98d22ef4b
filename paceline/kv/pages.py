"""The free list of KV pages."""

from __future__ import annotations

from paceline.errors import ConfigError


class PagePool:
    """Hands out page numbers 1 to num_pages - 1, each to one owner at a time; page 0 is the cache's waste page.

    An owner is a request (pages not yet shared) or the radix tree (pages any request may read).
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 2:
            raise ConfigError(f"the KV cache needs at least 2 pages, got {num_pages}")
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, 0, -1))
        self._is_free = bytearray([0] + [1] * (num_pages - 1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """`count` pages in ascending order, which are often consecutive; the caller has checked `num_free`."""
        assert 0 <= count <= len(self._free), f"{count} pages needed, {len(self._free)} free"
        split = len(self._free) - count
        pages = sorted(self._free[split:])
        del self._free[split:]
        for page in pages:
            self._is_free[page] = 0
        return pages

    def free(self, pages: list[int]) -> None:
        """Returns pages to the list. Freeing a free page, or page 0, is a bug in the caller."""
        for page in pages:
            assert 0 < page < self.num_pages and not self._is_free[page], f"page {page} freed twice or never allocated"
            self._is_free[page] = 1
        self._free.extend(reversed(pages))
