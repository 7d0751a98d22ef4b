"""Responses that are kept for their clients: in memory, bounded in size and age, each for the key that asked."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from paceline.errors import NotFound

Item = dict[str, Any]
_TURN_BYTES, _ITEM_BYTES = 1024, 256  # about what Python keeps besides the texts themselves


@dataclass(eq=False)
class Turn:
    """A request's items and those of its response, each as a list in JSON. All that follow a turn share it."""

    tenant: str
    before: Turn | None
    given: bytes
    output: bytes
    names: tuple[str, ...]  # of the items
    held: int = 0  # by entries and by later turns

    @property
    def size(self) -> int:
        return len(self.given) + len(self.output) + _TURN_BYTES + _ITEM_BYTES * len(self.names)

    @property
    def items(self) -> list[Item]:
        return [*read(self.given), *read(self.output)]


@dataclass(frozen=True)
class Entry:
    """A response as it was sent, as JSON, with its turn; `used` is when it was last asked for."""

    response: bytes
    turn: Turn
    used: float


def read(items: bytes) -> list[Item]:
    return msgspec.json.decode(items, type=list[Item])


def history(turn: Turn | None) -> list[Item]:
    """All items from the conversation's first to the turn's last."""
    turns = []
    while turn is not None:
        turns.append(turn)
        turn = turn.before
    return [item for each in reversed(turns) for item in each.items]


@dataclass
class Store:
    """Keeps at most `max_bytes` of responses and conversations, each until it was not asked for in `seconds`.

    Those least recently used go first. 0 bytes keep nothing. A turn stays while a response that follows it is kept.
    """

    max_bytes: int = 256 << 20
    seconds: float = 3600.0
    clock: Callable[[], float] = time.monotonic
    size: int = 0
    _entries: OrderedDict[tuple[str, str], Entry] = field(default_factory=OrderedDict)
    _turns: dict[tuple[str, str], Turn] = field(default_factory=dict)  # by their items' ids

    @property
    def enabled(self) -> bool:
        return self.max_bytes > 0 and self.seconds > 0

    def keep(self, response: dict[str, Any], turn: Turn) -> None:
        """Keeps a response under its id, for the key of its turn."""
        entry = Entry(msgspec.json.encode(response), turn, self.clock())
        self._entries[turn.tenant, response["id"]] = entry
        self.size += len(entry.response)
        self._hold(turn)
        while self.size > self.max_bytes:
            self._drop(next(iter(self._entries)))

    def get(self, tenant: str, name: str) -> Entry:
        """The response `name` of a key. Raises NotFound for one that is not kept, whyever."""
        self._expire()
        entry = self._entries.get((tenant, name))
        if entry is None:
            raise NotFound(f"the response {name[:100]!r} is unknown here, or has expired: {self._rule}")
        self._entries[tenant, name] = entry = Entry(entry.response, entry.turn, self.clock())
        self._entries.move_to_end((tenant, name))
        return entry

    def delete(self, tenant: str, name: str) -> None:
        """Forgets a response; turns that others follow stay. Raises NotFound as `get`."""
        self.get(tenant, name)
        self._drop((tenant, name))

    def item(self, tenant: str, name: str) -> Item:
        """The item with the id `name`. Raises NotFound for one that no response kept for the key has."""
        self._expire()
        turn = self._turns.get((tenant, name))
        if turn is None:
            raise NotFound(f"the item {name[:100]!r} is unknown here, or has expired: {self._rule}")
        return next(each for each in turn.items if each.get("id") == name)

    @property
    def _rule(self) -> str:
        if not self.enabled:
            return "this server keeps no responses (--store-mb 0), so send the whole conversation as input"
        return f"responses are kept {self.seconds / 60:g} minutes after their last use, in {self.max_bytes >> 20} MB"

    def _expire(self) -> None:
        end = self.clock() - self.seconds
        while self._entries and next(iter(self._entries.values())).used <= end:
            self._drop(next(iter(self._entries)))

    def _drop(self, key: tuple[str, str]) -> None:
        entry = self._entries.pop(key)
        self.size -= len(entry.response)
        for turn in self._chain(entry.turn):
            turn.held -= 1
            if turn.held:
                break
            self.size -= turn.size
            for name in turn.names:
                if self._turns.get((turn.tenant, name)) is turn:
                    del self._turns[turn.tenant, name]

    def _hold(self, turn: Turn) -> None:
        """Counts one more that needs a turn, and those before it where nobody else needed it."""
        for each in self._chain(turn):
            each.held += 1
            if each.held > 1:
                break
            self.size += each.size
            self._turns.update(((each.tenant, name), each) for name in each.names)

    def _chain(self, turn: Turn | None) -> Iterator[Turn]:
        while turn is not None:
            yield turn
            turn = turn.before
