"""Markup in what a caller gives, made harmless while a chat template is at work on it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

_PRIVATE = range(0xF0000, 0xFFFFE)  # code points that no standard will ever give a meaning
_STAND_IN = re.compile("[\U000f0000-\U000ffffd]")


@dataclass(frozen=True)
class Hiding:
    """Replaces one character of each token, wherever in the given text it stands, by one that occurs nowhere else.

    So a template can cut text up and join it as it likes without making a token of it, and lengths stay the same. Only
    the `visible` texts, none of which can be a part of a token, are left as they are.
    """

    stand_ins: Mapping[str, str]
    visible: re.Pattern[str]

    @classmethod
    def choose(cls, tokens: frozenset[str], visible: frozenset[str], used: Iterable[str]) -> Hiding:
        return _chosen(tokens, visible, frozenset(each for text in used for each in _stand_ins(text)))

    def hide(self, value: Any) -> Any:
        """`value` with every string in it, names in mappings too, made harmless."""
        if isinstance(value, str):
            if not any(character in value for character in self.stand_ins):
                return value
            pieces = self.visible.split(value)
            pieces[::2] = [self._hide(piece) for piece in pieces[::2]]
            return "".join(pieces)
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.hide(each) for each in value)
        return value

    def _hide(self, text: str) -> str:
        # a replacement each is many times as fast as str.translate
        for character, stand_in in self.stand_ins.items():
            text = text.replace(character, stand_in)
        return text

    def reveal(self, text: str) -> str:
        for character, stand_in in self.stand_ins.items():
            text = text.replace(stand_in, character)
        return text


@lru_cache(maxsize=16)
def _chosen(tokens: frozenset[str], visible: frozenset[str], taken: frozenset[str]) -> Hiding:
    free = (chr(code) for code in _PRIVATE if chr(code) not in taken)
    stand_ins = {character: next(free) for character in sorted({_telling(text) for text in tokens})}
    harmless = [text for text in visible if not any(_could_overlap(text, token) for token in tokens)]
    return Hiding(stand_ins, any_of(harmless))


def _stand_ins(text: str) -> list[str]:
    return [] if text.isascii() else _STAND_IN.findall(text)


def _telling(token: str) -> str:
    """The character of a token to hide: its first that words are not made of, where it has one."""
    return next((each for each in token if not each.isalnum() and not each.isspace()), token[0])


def _could_overlap(text: str, token: str) -> bool:
    """Whether `token` could begin within `text`."""
    return any(token.startswith(text[start:]) or text.startswith(token, start) for start in range(len(text)))


def strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from strings(key)
            yield from strings(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from strings(each)


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Splits text into what is none of `texts` and what is one, in turn; the longest wins at each place."""
    pattern = "|".join(re.escape(each) for each in sorted(texts, key=len, reverse=True))
    return re.compile(f"({pattern or '(?!)'})")
