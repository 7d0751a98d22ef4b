"""Several stop strings found at once in text that comes in pieces: the automaton of Aho and Corasick (1975)."""

from __future__ import annotations

import re
from collections import deque
from functools import lru_cache


class StopStrings:
    """A trie of the strings. State 0 is its root; each step over a character is one look-up, however many strings there are.

    `depth[state]` is how much of the text's end begins a string, `longest[state]` the length of the longest string that
    ends there, 0 where none does. `first` finds the characters that leave the root.
    """

    def __init__(self, strings: tuple[str, ...]) -> None:
        self.first = re.compile(f"[{''.join(re.escape(each[0]) for each in strings)}]")
        self._next: list[dict[str, int]] = [{}]
        self.depth = [0]
        self.longest = [0]
        self._fallback = [0]
        for string in strings:
            self._add(string)
        self._link()

    def step(self, state: int, character: str) -> int:
        """The state after one more character."""
        while character not in self._next[state]:
            if not state:
                return 0
            state = self._fallback[state]
        return self._next[state][character]

    def _add(self, string: str) -> None:
        state = 0
        for character in string:
            if character not in self._next[state]:
                self._next[state][character] = len(self._next)
                self._next.append({})
                self.depth.append(self.depth[state] + 1)
                self.longest.append(0)
                self._fallback.append(0)
            state = self._next[state][character]
        self.longest[state] = len(string)

    def _link(self) -> None:
        """Gives each state, parents first, the state of its longest proper end that begins a string."""
        waiting = deque(self._next[0].values())
        while waiting:
            state = waiting.popleft()
            for character, child in self._next[state].items():
                self._fallback[child] = self.step(self._fallback[state], character)
                self.longest[child] = max(self.longest[child], self.longest[self._fallback[child]])
                waiting.append(child)


@lru_cache(maxsize=8)  # of the longest strings one takes 5 MB
def stop_strings(strings: tuple[str, ...]) -> StopStrings:
    """One for all requests with the same strings."""
    return StopStrings(strings)
