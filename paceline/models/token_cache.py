"""An LRU cache of encoded texts. An agent's prompt mostly repeats the prompt of the turn before."""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable

# bounds memory: the characters of cached texts; with their tokens they take about twice as many bytes
_MAX_CHARACTERS = 1 << 25
_ENTRY_COST = 256  # characters that each entry counts for in addition, so that many short texts stay bounded too


class TokenCache:
    """The tokens of the most recently used texts, by text. Thread-safe.

    Special tokens separate a chat's messages, and no token spans such a boundary. So each message can be encoded, and cached,
    by itself.
    """

    def __init__(self, max_characters: int = _MAX_CHARACTERS) -> None:
        self._max_characters = max_characters
        self._num_characters = 0
        self._entries: OrderedDict[str, array[int]] = OrderedDict()
        self._lock = threading.Lock()

    def encode(self, text: str, encode: Callable[[str], list[int]]) -> list[int]:
        """The cached tokens of `text`, or those that `encode` returns for it."""
        with self._lock:
            found = self._entries.get(text)
            if found is not None:
                self._entries.move_to_end(text)
                return found.tolist()
        tokens = encode(text)
        with self._lock:
            if text not in self._entries:
                self._entries[text] = array("i", tokens)
                self._num_characters += len(text) + _ENTRY_COST
            while self._num_characters > self._max_characters:
                self._num_characters -= len(self._entries.popitem(last=False)[0]) + _ENTRY_COST
        return tokens
