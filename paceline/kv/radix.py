"""The prefix cache: a radix tree from token runs to the pages that hold their cached state."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

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
    `namespace` is set for a root alone, which has no pages and no parent.
    """

    tokens: Tokens
    pages: list[int]
    parent: Node | None
    children: dict[bytes, Node] = field(default_factory=dict)
    locks: int = 0
    last_use: int = 0
    namespace: str = ""

    @property
    def evictable(self) -> bool:
        """Whether its pages may be freed now: a leaf of the tree that no request reads."""
        return self.parent is not None and bool(self.pages) and not self.children and self.locks == 0


class Place(NamedTuple):
    """The end of a run: after `length` pages of `node`. Valid until the tree next changes."""

    node: Node
    length: int


class RadixTree:
    """Owns the pages inserted into it. `namespace` separates tenants: equal tokens in two namespaces share nothing."""

    def __init__(self, pool: PagePool, page_size: int) -> None:
        self.pool = pool
        self.page_size = page_size
        self.num_pages = 0
        self.num_locked = 0
        self.num_inserts = 0
        self._roots: dict[str, Node] = {}
        self._clock = itertools.count(1)
        self._order = itertools.count()
        # (last use, order, node) of every evictable leaf, and entries that are out of date, which eviction skips
        self._leaves: list[tuple[int, int, Node]] = []
        self._num_nodes = 0

    def match(self, tokens: ArrayLike, namespace: str = "") -> tuple[list[int], Place]:
        """The pages of the longest cached run of whole pages that starts `tokens`, and where it ends.

        Changes nothing: the pages may be evicted at any time until `lock`.
        """
        wanted = np.asarray(tokens, dtype=np.int64)
        node = self._roots.get(namespace) or _root(namespace)
        pages: list[int] = []
        length = 0
        while length == len(node.pages) and (child := node.children.get(self._first(wanted, len(pages)))):
            rest = wanted[len(pages) * self.page_size :][: len(child.tokens)]
            different = np.flatnonzero(rest != child.tokens[: len(rest)])
            length = int(different[0] if len(different) else len(rest)) // self.page_size
            pages += child.pages[:length]
            node = child
        return pages, Place(node, length)

    def lock(self, place: Place) -> Node:
        """Protects the run that ends at `place` from eviction until `unlock`, and marks it as used now.

        Splits a node that extends beyond the run. Returns the run's last node, which `unlock` takes.
        """
        node = self._ending(place)
        now = next(self._clock)
        for each in _upwards(node):
            if each.locks == 0:
                self.num_locked += len(each.pages)
            each.locks += 1
            each.last_use = now
        return node

    def unlock(self, node: Node) -> None:
        """Takes back one `lock` of the node."""
        for each in _upwards(node):
            assert each.locks > 0, "a node was unlocked more often than locked"
            each.locks -= 1
            if each.locks == 0:
                self.num_locked -= len(each.pages)
        self._note(node)

    def insert(
        self, tokens: ArrayLike, pages: list[int], num_shared: int, namespace: str = ""
    ) -> tuple[list[int], Place]:
        """Gives the tree a request's whole pages; returns the pages that now hold the run, and where it ends.

        The first `num_shared` of `pages` are the tree's already (the caller matched and locked them). A page whose run is
        in the tree by now is freed: the first to arrive keeps its place. Tokens beyond the last whole page must not come
        with a page.
        """
        whole = np.asarray(tokens, dtype=np.int64)
        count = len(whole) // self.page_size
        assert count == len(pages), f"{count} whole pages of tokens came with {len(pages)} pages"
        self._roots.setdefault(namespace, _root(namespace))
        self.num_inserts += 1
        held, place = self.match(whole, namespace)
        matched = len(held)
        assert held[:num_shared] == pages[:num_shared], "the shared pages are not the tree's"
        self.pool.free(
            [page for page, kept in zip(pages[num_shared:matched], held[num_shared:], strict=True) if page != kept]
        )
        if matched < count:
            node = self._ending(place)
            own = whole[matched * self.page_size : count * self.page_size].copy()
            leaf = Node(own, pages[matched:], node, last_use=next(self._clock))
            node.children[self._first(own)] = leaf
            self.num_pages += len(leaf.pages)
            self._num_nodes += 1
            self._note(leaf)
            place = Place(leaf, len(leaf.pages))
        return held + pages[matched:], place

    def evict(self, count: int) -> int:
        """Frees at least `count` pages if it can, least recently used leaves first; returns how many were freed."""
        freed = 0
        while self._leaves and freed < count:
            last_use, _, leaf = heapq.heappop(self._leaves)
            if not leaf.evictable or leaf.last_use != last_use:
                continue  # out of date
            parent = leaf.parent
            take = min(count - freed, len(leaf.pages))
            self._drop_tail(leaf, take)
            freed += take
            self._note(leaf if leaf.pages else parent)
        return freed

    @property
    def num_evictable(self) -> int:
        return self.num_pages - self.num_locked

    def _note(self, node: Node | None) -> None:
        """Adds a node that may be evicted to the heap. Drops entries that are out of date when they are too many."""
        if node is None or not node.evictable:
            return
        heapq.heappush(self._leaves, (node.last_use, next(self._order), node))
        if len(self._leaves) > 2 * self._num_nodes + 64:
            latest = {id(each[2]): each for each in self._leaves if each[2].evictable and each[2].last_use == each[0]}
            self._leaves = list(latest.values())
            heapq.heapify(self._leaves)

    def _drop_tail(self, leaf: Node, count: int) -> None:
        keep = len(leaf.pages) - count
        self.pool.free(leaf.pages[keep:])
        self.num_pages -= count
        if keep == 0:
            parent = leaf.parent
            assert parent is not None
            del parent.children[self._first(leaf.tokens)]
            self._num_nodes -= 1
            if parent.parent is None and not parent.children:
                del self._roots[parent.namespace]
        del leaf.pages[keep:]
        leaf.tokens = leaf.tokens[: keep * self.page_size]

    def _ending(self, place: Place) -> Node:
        """The node that ends there: the upper half of `place.node` where it is cut."""
        node, length = place
        if length == len(node.pages):
            return node
        return self._split(node, length)

    def _split(self, node: Node, length: int) -> Node:
        """Cuts `node` after `length` pages; returns the new upper half, which carries the same locks."""
        assert node.parent is not None
        cut = length * self.page_size
        upper = Node(node.tokens[:cut], node.pages[:length], node.parent, locks=node.locks, last_use=node.last_use)
        node.parent.children[self._first(upper.tokens)] = upper
        node.tokens, node.pages, node.parent = node.tokens[cut:], node.pages[length:], upper
        upper.children[self._first(node.tokens)] = node
        self._num_nodes += 1
        return upper

    def _first(self, tokens: Tokens, page: int = 0) -> bytes:
        """The key in `Node.children` of a run that starts with this page. A page that is not whole equals no key."""
        return tokens[page * self.page_size : (page + 1) * self.page_size].tobytes()


def _root(namespace: str) -> Node:
    return Node(np.empty(0, dtype=np.int64), [], None, namespace=namespace)


def _upwards(node: Node | None) -> Iterator[Node]:
    while node is not None and node.parent is not None:
        yield node
        node = node.parent
