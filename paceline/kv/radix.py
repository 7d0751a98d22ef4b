"""The prefix cache: a radix tree from token runs to the pages that hold their keys and values."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from paceline.kv.pages import PagePool

Tokens = NDArray[np.int64]


@dataclass(eq=False)
class Node:
    """A run of whole pages after its parent's, and the tokens they hold. Children are found by their first page's tokens.

        root -- [system prompt: 40 pages] --+-- [file A: 12 pages] -- [turn 1: 3 pages]
                                            +-- [file B:  9 pages]

    `locks` counts the requests that read this node or one below it; only a leaf without locks can be evicted.
    """

    tokens: Tokens
    pages: list[int]
    parent: Node | None
    children: dict[bytes, Node] = field(default_factory=dict)
    locks: int = 0
    last_use: int = 0


class RadixTree:
    """Owns the pages inserted into it. `namespace` keeps tenants apart: equal tokens in two namespaces share nothing."""

    def __init__(self, pool: PagePool, page_size: int) -> None:
        self.pool = pool
        self.page_size = page_size
        self.num_pages = 0
        self.num_locked = 0
        self._roots: dict[str, Node] = {}
        self._clock = itertools.count(1)

    def match(self, tokens: ArrayLike, namespace: str = "") -> tuple[list[int], Node]:
        """The pages of the longest cached run of whole pages that starts `tokens`, and the node where it ends.

        Splits a node when the match ends inside it, so that the node stands for exactly the matched run. The pages may be
        evicted at any time until `lock(node)`.
        """
        wanted = np.asarray(tokens, dtype=np.int64)
        node = self._roots.get(namespace) or _root()
        pages: list[int] = []
        while child := node.children.get(self._first(wanted, len(pages))):
            rest = wanted[len(pages) * self.page_size :][: len(child.tokens)]
            different = np.flatnonzero(rest != child.tokens[: len(rest)])
            shared = int(different[0] if len(different) else len(rest)) // self.page_size
            if shared < len(child.pages):
                child = self._split(child, shared)
            child.last_use = next(self._clock)
            pages += child.pages
            node = child
        return pages, node

    def lock(self, node: Node) -> None:
        """Keeps the node and all above it from eviction until `unlock`."""
        for each in _upwards(node):
            if each.locks == 0:
                self.num_locked += len(each.pages)
            each.locks += 1

    def unlock(self, node: Node) -> None:
        for each in _upwards(node):
            assert each.locks > 0, "a node was unlocked more often than locked"
            each.locks -= 1
            if each.locks == 0:
                self.num_locked -= len(each.pages)

    def insert(
        self, tokens: ArrayLike, pages: list[int], num_shared: int, namespace: str = ""
    ) -> tuple[list[int], Node]:
        """Gives the tree a request's whole pages; returns the pages that now hold the run and the node where it ends.

        The first `num_shared` of `pages` are the tree's already (the caller matched and locked them). A page whose run is
        in the tree by now is freed: the first to arrive keeps its place. Tokens beyond the last whole page must not come
        with a page.
        """
        whole = np.asarray(tokens, dtype=np.int64)
        count = len(whole) // self.page_size
        assert count == len(pages), f"{count} whole pages of tokens came with {len(pages)} pages"
        self._roots.setdefault(namespace, _root())
        held, node = self.match(whole, namespace)
        matched = len(held)
        assert held[:num_shared] == pages[:num_shared], "the shared pages are not the tree's"
        self.pool.free(
            [page for page, kept in zip(pages[num_shared:matched], held[num_shared:], strict=True) if page != kept]
        )
        if matched < count:
            own = whole[matched * self.page_size : count * self.page_size].copy()
            leaf = Node(own, pages[matched:], node, last_use=next(self._clock))
            node.children[self._first(own)] = leaf
            self.num_pages += len(leaf.pages)
            node = leaf
        return held + pages[matched:], node

    def evict(self, count: int) -> int:
        """Frees at least `count` pages if it can, least recently used leaves first; returns how many were freed."""
        heap = [(leaf.last_use, id(leaf), leaf) for leaf in self._leaves() if leaf.locks == 0]
        heapq.heapify(heap)
        freed = 0
        while heap and freed < count:
            leaf = heapq.heappop(heap)[2]
            take = min(count - freed, len(leaf.pages))
            self._drop_tail(leaf, take)
            freed += take
            parent = leaf.parent
            gone = not leaf.pages and parent is not None and parent.parent is not None
            if gone and parent is not None and not parent.children and parent.locks == 0:
                heapq.heappush(heap, (parent.last_use, id(parent), parent))
        self._roots = {name: root for name, root in self._roots.items() if root.children}
        return freed

    @property
    def num_evictable(self) -> int:
        return self.num_pages - self.num_locked

    def _drop_tail(self, leaf: Node, count: int) -> None:
        keep = len(leaf.pages) - count
        self.pool.free(leaf.pages[keep:])
        self.num_pages -= count
        if keep == 0:
            assert leaf.parent is not None
            del leaf.parent.children[self._first(leaf.tokens)]
        del leaf.pages[keep:]
        leaf.tokens = leaf.tokens[: keep * self.page_size]

    def _split(self, node: Node, length: int) -> Node:
        """Cuts `node` after `length` pages; returns the new upper half, which carries the same locks."""
        assert node.parent is not None
        cut = length * self.page_size
        upper = Node(node.tokens[:cut], node.pages[:length], node.parent, locks=node.locks, last_use=node.last_use)
        node.parent.children[self._first(upper.tokens)] = upper
        node.tokens, node.pages, node.parent = node.tokens[cut:], node.pages[length:], upper
        upper.children[self._first(node.tokens)] = node
        return upper

    def _first(self, tokens: Tokens, page: int = 0) -> bytes:
        """The tokens of one page, as `Node.children` has them; of a page that is not whole, what no child is named."""
        return tokens[page * self.page_size : (page + 1) * self.page_size].tobytes()

    def _leaves(self) -> Iterator[Node]:
        stack = [child for root in self._roots.values() for child in root.children.values()]
        while stack:
            node = stack.pop()
            if node.children:
                stack.extend(node.children.values())
            else:
                yield node


def _root() -> Node:
    return Node(np.empty(0, dtype=np.int64), [], None)


def _upwards(node: Node | None) -> Iterator[Node]:
    while node is not None and node.parent is not None:
        yield node
        node = node.parent
