"""Search for several stop strings at once in streamed text: the automaton of Aho and Corasick (1975)."""

from __future__ import annotations

import re
from collections import deque
from functools import lru_cache


class StopStrings:
    """A trie of the strings with fallback links. State 0 is its root; a character costs the same for any number of strings.

    `depth[state]` is the length of the longest end of the text that begins a string; `longest[state]` is the length of the
    longest string that ends at the state, 0 for none. `first` matches the characters that leave the root.
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
        """Links each state, parents first, to the state of its longest proper suffix that begins a string."""
        waiting = deque(self._next[0].values())
        while waiting:
            state = waiting.popleft()
            for character, child in self._next[state].items():
                self._fallback[child] = self.step(self._fallback[state], character)
                self.longest[child] = max(self.longest[child], self.longest[self._fallback[child]])
                waiting.append(child)


@lru_cache(maxsize=8)  # one automaton of the longest strings allowed takes 5 MB
def stop_strings(strings: tuple[str, ...]) -> StopStrings:
    """The automaton of the strings; requests with the same strings share one."""
    return StopStrings(strings)
