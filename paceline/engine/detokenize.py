"""Text out of tokens as they come, never half a character, and stop strings found across tokens."""

from __future__ import annotations

import codecs
from collections.abc import Callable


class Detokenizer:
    """Feeds on tokens, gives text. What could still become a stop string, or half a character, is held back.

    Of several stop strings the one that is whole first ends the text (of those that end together, the one that begins
    first), so that the text does not depend on how the tokens are grouped.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], stop: tuple[str, ...]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = stop
        self._held = ""
        self.stopped = False

    def feed(self, tokens: list[int]) -> tuple[str, int]:
        """The text that is now certain, and how many of `tokens` it took: all, or those up to the end of a stop string.

        After a stop string `stopped` is True and nothing more is taken.
        """
        if not self._stop:
            return self._decoder.decode(b"".join(map(self._token_bytes, tokens))), len(tokens)
        if self.stopped:
            return "", 0
        held, state = self._held, self._decoder.getstate()
        self._held += self._decoder.decode(b"".join(map(self._token_bytes, tokens)))
        text = self._release()
        if not self.stopped or len(tokens) == 1:
            return text, len(tokens)
        # one of them ended it; which one is found by feeding them one by one
        self._held, self.stopped = held, False
        self._decoder.setstate(state)
        parts: list[str] = []
        while not self.stopped:
            parts.append(self.feed([tokens[len(parts)]])[0])
        return "".join(parts), len(parts)

    def finish(self) -> str:
        """The rest at the end of the output; a character cut in half becomes U+FFFD."""
        if self.stopped:
            return ""
        self._held += self._decoder.decode(b"", final=True)
        text, self._held = self._held, ""
        return text

    def _release(self) -> str:
        found = [(place + len(stop), place) for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)[1]], ""
            return text
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
