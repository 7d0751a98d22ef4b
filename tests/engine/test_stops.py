"""Stop strings: which one ends the text, where, and at what cost."""

from __future__ import annotations

import random
import time

import pytest

from paceline.engine.detokenize import Detokenizer
from paceline.errors import RequestError
from paceline.types import FinishReason, Request, Sampling
from tests.tiny import tiny_engine


def ended(text: str, stops: tuple[str, ...], early: int) -> tuple[str, bool]:
    """The definition: the first character at which a string is whole ends the text before the longest such string."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if end > early and text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


def test_any_strings_in_any_pieces_as_the_definition_says() -> None:
    draw = random.Random(5)
    stopped = 0
    for _ in range(2000):
        stops = tuple("".join(draw.choices("ab", k=draw.randrange(1, 6))) for _ in range(draw.randrange(1, 7)))
        text = "".join(draw.choices("abc", weights=(4, 4, 3), k=draw.randrange(30)))
        early = draw.choice((0, 0, draw.randrange(12)))
        maker = Detokenizer(lambda token: bytes([token]), stops, early)
        parts, tokens, taken = [], list(text.encode()), 0
        while tokens:
            count = draw.randrange(1, 6)
            piece, used = maker.feed(tokens[:count])
            parts.append(piece)
            taken += used
            tokens = tokens[count:]
        found = "".join(parts) + maker.finish()
        assert (found, maker.stopped) == ended(text, stops, early), (text, stops, early)
        stopped += maker.stopped
    assert 500 < stopped < 1900


def test_min_tokens_are_written_whatever_stop_strings_come() -> None:
    engine = tiny_engine(drafter="none")
    whole = engine.generate([Request([70, 71], Sampling(max_tokens=40, ignore_eos=True))])[0]
    stop = (whole.text[3], whole.text[9:11])
    for settings in ({"drafter": "none"}, {"fixed_draft": 16}):
        sampling = Sampling(max_tokens=40, min_tokens=20, ignore_eos=True, stop=stop)
        found = tiny_engine(**settings).generate([Request([70, 71], sampling)])[0]  # type: ignore[arg-type]
        assert len(found.tokens) >= 20 and found.text.startswith(whole.text[:15])


def test_a_single_string_is_one_stop_string() -> None:
    assert Sampling(stop="END").stop == ("END",)  # type: ignore[arg-type]
    assert Sampling(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]
    completion = tiny_engine().generate([Request([70, 71], Sampling(max_tokens=40, stop="END", ignore_eos=True))])[0]  # type: ignore[arg-type]
    assert completion.finish is FinishReason.LENGTH


def test_their_number_and_length_are_bounded_and_so_is_their_cost() -> None:
    for stop in (tuple(map(str, range(65))), ("x" * 16385,), ("",)):
        with pytest.raises(RequestError, match="stop"):
            Sampling(stop=stop)
    longest = tuple(f"{index:02}" + "a" * 254 for index in range(64))
    maker = Detokenizer(lambda token: bytes([token]), Sampling(stop=longest).stop)
    began = time.perf_counter()
    for _ in range(1000):
        maker.feed(list(b"aaaa 12aa"))
    assert time.perf_counter() - began < 1.0
    assert not maker.stopped
