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
        for count, token in enumerate(tokens, 1):
            self._early -= 1
            piece = self._decoder.decode(self._token_bytes(token))
            ended = self._read(piece)
            if ended is not None:
                self.stopped = True
                text, self._held = self._held[:ended], ""
                return text, count
        keep = len(self._held) - self._stop.depth[self._state]
        text, self._held = self._held[:keep], self._held[keep:]
        return text, len(tokens)

    def finish(self) -> str:
        """The rest at the end of the output; a character cut in half becomes U+FFFD."""
        if self.stopped:
            return ""
        self._held += self._decoder.decode(b"", final=True)
        text, self._held = self._held, ""
        return text

    def _read(self, piece: str) -> int | None:
        """Adds text to what is held; where a stop string ends in it, the place in what is held where that begins."""
        assert self._stop is not None
        base = len(self._held)
        self._held += piece
        for place, character in enumerate(piece, base + 1):
            self._state = self._stop.step(self._state, character)
            longest = self._stop.longest[self._state]
            if longest and self._early < 0:
                return place - longest
        return None
