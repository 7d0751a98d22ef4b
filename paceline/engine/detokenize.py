"""Text out of tokens as they come, never half a character, and stop strings found across tokens."""

from __future__ import annotations

import codecs
from collections.abc import Callable

from paceline.engine.stops import stop_strings


class Detokenizer:
    """Feeds on tokens, gives text. What could still become a stop string, or half a character, is held back.

    Of several stop strings the one that is whole first ends the text (of those that end together, the one that begins
    first), so that the text does not depend on how the tokens are grouped. None ends it within the first `min_tokens`
    tokens. `token_bytes` gives a token's part of the text, which for a control token is nothing.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], stop: tuple[str, ...], min_tokens: int = 0) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = stop_strings(stop) if stop else None
        self._state = 0
        self._held = ""
        self._early = min_tokens
        self.stopped = False

    def feed(self, tokens: list[int]) -> tuple[str, int]:
        """The text that is now certain, and how many of `tokens` it took: all, or those up to the end of a stop string.

        After a stop string `stopped` is True and nothing more is taken.
        """
        if self._stop is None:
            return self._decoder.decode(b"".join(map(self._token_bytes, tokens))), len(tokens)
        if self.stopped:
            return "", 0
        early, self._early = self._early, max(0, self._early - len(tokens))
        taken = 0
        for part, ends in ((tokens[:early], False), (tokens[early:], True)):
            before, held = self._decoder.getstate(), len(self._held)
            found = self._read(self._decoder.decode(b"".join(map(self._token_bytes, part))), ends)
            if found is not None:
                self.stopped = True
                self._decoder.setstate(before)
                text, self._held = self._held[: found[0]], ""
                return text, taken + self._up_to(found[1] - held, part)
            taken += len(part)
        keep = len(self._held) - self._stop.depth[self._state]
        text, self._held = self._held[:keep], self._held[keep:]
        return text, taken

    def finish(self) -> str:
        """The rest at the end of the output; a character cut in half becomes U+FFFD."""
        if self.stopped:
            return ""
        self._held += self._decoder.decode(b"", final=True)
        text, self._held = self._held, ""
        return text

    def _read(self, text: str, ends: bool) -> tuple[int, int] | None:
        """Adds text to what is held; where a stop string ends in it, and `ends` lets it, its start and end in what is held."""
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
        """How many of `tokens` give the text's first `end` characters."""
        for count, token in enumerate(tokens, 1):
            end -= len(self._decoder.decode(self._token_bytes(token)))
            if end <= 0:
                return count
        return len(tokens)
