"""Stored responses, in memory, bounded in size and age. Each is visible only to the API key that requested it."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from paceline.errors import NotFound

Item = dict[str, Any]
_TURN_BYTES, _ITEM_BYTES = 1024, 256  # estimates of Python's overhead besides the texts


@dataclass(eq=False)
class Turn:
    """A request's items (`given`) and its response's (`output`), each as a JSON list. All turns that follow a turn share it."""

    tenant: str
    before: Turn | None
    given: bytes
    output: bytes
    item_ids: tuple[str, ...]  # ids of all items
    num_references: int = 0  # from entries and later turns

    @property
    def size(self) -> int:
        return len(self.given) + len(self.output) + _TURN_BYTES + _ITEM_BYTES * len(self.item_ids)

    @property
    def items(self) -> list[Item]:
        return [*decode_items(self.given), *decode_items(self.output)]


@dataclass(frozen=True)
class Entry:
    """A stored response as it was sent (JSON), with its turn. `used` is the time of its last use, by the store's clock."""

    response: bytes
    turn: Turn
    used: float


def decode_items(items: bytes) -> list[Item]:
    return msgspec.json.decode(items, type=list[Item])


def history(turn: Turn | None) -> list[Item]:
    """All items of a conversation, from its first turn to `turn`."""
    turns = []
    while turn is not None:
        turns.append(turn)
        turn = turn.before
    return [item for each in reversed(turns) for item in each.items]


@dataclass
class Store:
    """Stores at most `max_bytes` of responses and conversations, each until `seconds` after its last use.

    The least recently used responses are evicted first. 0 bytes store nothing. A turn stays as long as a response that
    follows it is stored.
    """

    max_bytes: int = 256 << 20
    seconds: float = 3600.0
    clock: Callable[[], float] = time.monotonic
    size: int = 0
    _entries: OrderedDict[tuple[str, str], Entry] = field(default_factory=OrderedDict)
    _turns: dict[tuple[str, str], Turn] = field(default_factory=dict)  # by tenant and item id

    @property
    def enabled(self) -> bool:
        return self.max_bytes > 0 and self.seconds > 0

    def add(self, response: dict[str, Any], turn: Turn) -> None:
        """Stores a response under its id, for its turn's tenant."""
        entry = Entry(msgspec.json.encode(response), turn, self.clock())
        self._entries[turn.tenant, response["id"]] = entry
        self.size += len(entry.response)
        self._retain(turn)
        while self.size > self.max_bytes:
            self._evict(next(iter(self._entries)))

    def get(self, tenant: str, name: str) -> Entry:
        """The response with the id `name`. Raises NotFound if it is not stored for this tenant."""
        self._expire()
        entry = self._entries.get((tenant, name))
        if entry is None:
            raise NotFound(f"the response {name[:100]!r} is unknown or has expired: {self._rule}")
        self._entries[tenant, name] = entry = Entry(entry.response, entry.turn, self.clock())
        self._entries.move_to_end((tenant, name))
        return entry

    def delete(self, tenant: str, name: str) -> None:
        """Deletes a response. Turns that other stored responses follow stay. Raises NotFound as `get`."""
        self.get(tenant, name)
        self._evict((tenant, name))

    def item(self, tenant: str, name: str) -> Item:
        """The item with the id `name`. Raises NotFound if no response that is stored for this tenant has it."""
        self._expire()
        turn = self._turns.get((tenant, name))
        if turn is None:
            raise NotFound(f"the item {name[:100]!r} is unknown or has expired: {self._rule}")
        return next(each for each in turn.items if each.get("id") == name)

    @property
    def _rule(self) -> str:
        if not self.enabled:
            return "this server stores no responses (--store-mb 0), so send the whole conversation as input"
        return (
            f"responses are stored for {self.seconds / 60:g} minutes after their last use, in {self.max_bytes >> 20} MB"
        )

    def _expire(self) -> None:
        end = self.clock() - self.seconds
        while self._entries and next(iter(self._entries.values())).used <= end:
            self._evict(next(iter(self._entries)))

    def _evict(self, key: tuple[str, str]) -> None:
        entry = self._entries.pop(key)
        self.size -= len(entry.response)
        for turn in self._chain(entry.turn):
            turn.num_references -= 1
            if turn.num_references:
                break
            self.size -= turn.size
            for name in turn.item_ids:
                if self._turns.get((turn.tenant, name)) is turn:
                    del self._turns[turn.tenant, name]

    def _retain(self, turn: Turn) -> None:
        """Adds a reference to a turn, and to the turns before it if the turn had none."""
        for each in self._chain(turn):
            each.num_references += 1
            if each.num_references > 1:
                break
            self.size += each.size
            self._turns.update(((each.tenant, name), each) for name in each.item_ids)

    def _chain(self, turn: Turn | None) -> Iterator[Turn]:
        while turn is not None:
            yield turn
            turn = turn.before
