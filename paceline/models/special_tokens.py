"""Escapes special-token markup in caller-given text while a chat template renders it: only the template makes tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

_PRIVATE_CODE_POINTS = range(0xF0000, 0xFFFFE)  # a private-use area, whose code points have no standard meaning
_STAND_IN = re.compile("[\U000f0000-\U000ffffd]")


@dataclass(frozen=True)
class SpecialTokenEscaper:
    """Replaces one character of each special token, wherever it occurs in text, by a stand-in that occurs nowhere else.

    A template can then split and join the text without making a token of it, and lengths stay the same. `stand_ins` maps each
    replaced character to its stand-in. Texts that match `visible`, none of which overlaps a token, stay unescaped.
    """

    stand_ins: Mapping[str, str]
    visible: re.Pattern[str]

    @classmethod
    def for_texts(cls, tokens: frozenset[str], visible: frozenset[str], used: Iterable[str]) -> SpecialTokenEscaper:
        """An escaper of `tokens` whose stand-ins do not occur in the `used` texts."""
        return _escaper_for(tokens, visible, frozenset(each for text in used for each in _stand_ins_in(text)))

    def escape(self, value: Any) -> Any:
        """`value` with every string in it escaped, including the keys of mappings."""
        if isinstance(value, str):
            if not any(character in value for character in self.stand_ins):
                return value
            pieces = self.visible.split(value)
            pieces[::2] = [self._escape_text(piece) for piece in pieces[::2]]
            return "".join(pieces)
        if isinstance(value, Mapping):
            return {self.escape(key): self.escape(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.escape(each) for each in value)
        return value

    def _escape_text(self, text: str) -> str:
        # one str.replace per character is many times as fast as str.translate
        for character, stand_in in self.stand_ins.items():
            text = text.replace(character, stand_in)
        return text

    def restore(self, text: str) -> str:
        """The text with its stand-ins replaced by the characters they stand for."""
        for character, stand_in in self.stand_ins.items():
            text = text.replace(stand_in, character)
        return text


@lru_cache(maxsize=16)
def _escaper_for(
    tokens: frozenset[str], visible: frozenset[str], used_stand_ins: frozenset[str]
) -> SpecialTokenEscaper:
    free = (chr(code) for code in _PRIVATE_CODE_POINTS if chr(code) not in used_stand_ins)
    stand_ins = {character: next(free) for character in sorted({_escaped_character(text) for text in tokens})}
    safe_visible = [text for text in visible if not any(_may_begin_within(text, token) for token in tokens)]
    return SpecialTokenEscaper(stand_ins, splitting_pattern(safe_visible))


def _stand_ins_in(text: str) -> list[str]:
    return [] if text.isascii() else _STAND_IN.findall(text)


def _escaped_character(token: str) -> str:
    """The character of a token to escape: the first that is neither alphanumeric nor white space, else the first."""
    return next((each for each in token if not each.isalnum() and not each.isspace()), token[0])


def _may_begin_within(text: str, token: str) -> bool:
    """Whether `token` could begin within `text`."""
    return any(token.startswith(text[start:]) or text.startswith(token, start) for start in range(len(text)))


def all_strings(value: Any) -> Iterable[str]:
    """Every string in a JSON-like value, including the keys of mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from all_strings(key)
            yield from all_strings(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from all_strings(each)


def splitting_pattern(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern whose `split` returns, alternately, the text between occurrences of `texts` and the occurrences.

    At each place the longest of `texts` matches.
    """
    pattern = "|".join(re.escape(each) for each in sorted(texts, key=len, reverse=True))
    return re.compile(f"({pattern or '(?!)'})")
