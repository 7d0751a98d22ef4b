"""Texts that were encoded before: an agent's prompt is mostly its last turn's."""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable

_MOST_CHARACTERS = 1 << 25  # of texts kept; with their tokens about twice as many bytes
_OWN_COST = 256  # characters that a kept text counts for, however short it is


class Earlier:
    """The tokens of the texts asked for last, by text. May be used from several threads.

    A chat's messages are each a text of their own between special tokens, so what is kept is exact.
    """

    def __init__(self, most_characters: int = _MOST_CHARACTERS) -> None:
        self._most_characters = most_characters
        self._num_characters = 0
        self._kept: OrderedDict[str, array[int]] = OrderedDict()
        self._lock = threading.Lock()

    def encode(self, text: str, encode: Callable[[str], list[int]]) -> list[int]:
        """What `encode` gives for `text`; it is called only where the text is new."""
        with self._lock:
            found = self._kept.get(text)
            if found is not None:
                self._kept.move_to_end(text)
                return found.tolist()
        tokens = encode(text)
        with self._lock:
            if text not in self._kept:
                self._kept[text] = array("i", tokens)
                self._num_characters += len(text) + _OWN_COST
            while self._num_characters > self._most_characters:
                self._num_characters -= len(self._kept.popitem(last=False)[0]) + _OWN_COST
        return tokens
