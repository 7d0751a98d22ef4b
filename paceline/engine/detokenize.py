"""Incremental detokenisation: whole characters only, with stop strings found across tokens."""

from __future__ import annotations

import codecs
from collections.abc import Callable

from paceline.engine.stops import stop_strings


def whole_text(data: bytes) -> str | None:
    """The text of bytes, None where they are not whole characters."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


class Detokenizer:
    """Turns tokens into text. Holds back the end of the text while it may become a stop string or is half a character.

    The stop string that is complete first ends the text; of those that are complete together, the one that begins first.
    So the text does not depend on how tokens are grouped. No stop string applies within the first `min_tokens` tokens.
    `token_bytes` gives a token's bytes of the text, none for a control token.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], stop: tuple[str, ...], min_tokens: int = 0) -> None:
        self._token_bytes = token_bytes
        self._partial = b""  # the beginning of a character
        self._stop = stop_strings(stop) if stop else None
        self._state = 0
        self._held = ""
        self._early = min_tokens
        self.stopped = False

    @property
    def is_plain(self) -> bool:
        """Whether a token of whole characters is that text: no character has begun, and there is no stop string."""
        return self._stop is None and not self._partial

    def feed(self, tokens: list[int]) -> tuple[str, int]:
        """The text that is final now, and how many of `tokens` were used: all, or those up to the end of a stop string.

        After a stop string `stopped` is True and further tokens are ignored.
        """
        if self._stop is None:
            return self._decode(tokens), len(tokens)
        if self.stopped:
            return "", 0
        early, self._early = self._early, max(0, self._early - len(tokens))
        used = 0
        for part, ends in ((tokens[:early], False), (tokens[early:], True)):
            before, held = self._partial, len(self._held)
            found = self._read(self._decode(part), ends)
            if found is not None:
                self.stopped = True
                self._partial = before
                text, self._held = self._held[: found[0]], ""
                return text, used + self._up_to(found[1] - held, part)
            used += len(part)
        keep = len(self._held) - self._stop.depth[self._state]
        text, self._held = self._held[:keep], self._held[keep:]
        return text, used

    def finish(self) -> str:
        """The text held back, at the end of the output; half a character becomes U+FFFD."""
        if self.stopped:
            return ""
        self._held += self._partial.decode("utf-8", "replace")
        self._partial = b""
        text, self._held = self._held, ""
        return text

    def _decode(self, tokens: list[int]) -> str:
        """The whole characters of tokens."""
        data = self._partial + b"".join(map(self._token_bytes, tokens))
        text, used = codecs.utf_8_decode(data, "replace")
        self._partial = data[used:]
        return text

    def _read(self, text: str, ends: bool) -> tuple[int, int] | None:
        """Adds text to the held text. Returns start and end of a stop string that ends in it, where `ends` allows one."""
        assert self._stop is not None
        base, place = len(self._held), 0
        self._held += text
        while place < len(text):
            if not self._state:  # most of a text begins no stop string
                opening = self._stop.first.search(text, place)
                if opening is None:
                    break
                place = opening.start()
            self._state = self._stop.step(self._state, text[place])
            place += 1
            longest = self._stop.longest[self._state]
            if longest and ends:
                return base + place - longest, base + place
        return None

    def _up_to(self, end: int, tokens: list[int]) -> int:
        """How many of `tokens` it takes for the text's first `end` characters."""
        for count, token in enumerate(tokens, 1):
            end -= len(self._decode([token]))
            if end <= 0:
                return count
        return len(tokens)
