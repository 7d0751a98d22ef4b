"""Bodies and byte streams that a server must refuse, drawn at random from a seed, each with the name of its kind."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/messages/count_tokens", "/tokenize")
_HELLO = [{"role": "user", "content": "Hello"}]


def valid(path: str) -> dict[str, Any]:
    """A valid body for the endpoint."""
    if path == "/v1/completions":
        return {"model": "tiny", "prompt": "Hello", "max_tokens": 3}
    if path == "/v1/responses":
        return {"model": "tiny", "input": "Hello"}
    return {"model": "tiny", "messages": _HELLO, "max_tokens": 3}


def bodies(seed: int) -> Iterator[tuple[str, str, bytes]]:
    """Yields (kind, path, body) without end."""
    choose = random.Random(seed)
    while True:
        kind = choose.choice(list(_BODIES))
        path = choose.choice(PATHS)
        yield kind, path, _BODIES[kind](choose, path)


def _broken_text(choose: random.Random, path: str) -> bytes:
    data = json.dumps(valid(path)).encode()
    place = data.index(b"Hello") + choose.randrange(6)
    broken = choose.choice((b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\xc0\x80", b"\x80"))
    return data[:place] + broken + data[place:]


def _truncated(choose: random.Random, path: str) -> bytes:
    data = json.dumps(valid(path)).encode()
    return data[: choose.randrange(len(data))]


def _deep(choose: random.Random, path: str) -> bytes:
    depth = choose.choice((2000, 20_000, 200_000))
    opened, closed = choose.choice((("[", "]"), ('{"a":', "}"), ('{"content":[', "]}")))
    inner = opened * depth + ("1" + closed * depth if choose.random() < 0.5 else "")
    field = choose.choice(("messages", "tools", "metadata", "logit_bias", "input"))
    return f'{{"model":"tiny","{field}":{inner}}}'.encode() if choose.random() < 0.8 else inner.encode()


def _deep_schema(choose: random.Random, path: str) -> bytes:
    """A tool whose schema parses, but is nested too deeply to encode or to compile."""
    depth = choose.choice((600, 800, 900))
    schema = '{"a":' * depth + "1" + "}" * depth
    function = f'{{"name":"a","parameters":{schema}}}'
    tool = f'{{"name":"a","input_schema":{schema}}}' if "messages" in path else f'{{"function":{function}}}'
    whole = json.dumps(valid("/tokenize" if path == "/v1/completions" else path))
    if path == "/v1/completions":
        return f"{whole[:-1].replace('messages', 'prompt')}}}".encode()
    return f'{whole[:-1]},"tools":[{tool}]}}'.encode()


def _number(choose: random.Random, path: str) -> bytes:
    number = choose.choice(("1e999", "-1e999", "NaN", "Infinity", "-" + "9" * 5000, "0x10", "01", "1.", "--1", "1e"))
    field = "logit_bias" if path == "/tokenize" else choose.choice(("max_tokens", "temperature", "top_p"))
    whole = json.dumps(valid("/v1/messages")) if path == "/tokenize" else json.dumps(valid(path))
    if path == "/tokenize":
        return f'{{"prompt":{number}}}'.encode()
    if path == "/v1/messages/count_tokens":
        return whole.replace('"Hello"', number).encode()
    return f'{whole[:-1].replace(chr(34) + "max_tokens" + chr(34), chr(34) + "other" + chr(34))},"{field}":{number}}}'.encode()


def _type(choose: random.Random, path: str) -> bytes:
    field = "prompt" if path in ("/v1/completions", "/tokenize") else choose.choice(("messages", "model"))
    wrong = choose.choice((1.5, True, {"a": 1}, [[{}]], [None], -1))
    return json.dumps({**valid(path), field: wrong}).encode()


def _noise(choose: random.Random, path: str) -> bytes:
    return b"\x00" + choose.randbytes(choose.choice((0, 1, 100, 10_000)))


def _value(choose: random.Random, path: str) -> bytes:
    return choose.choice(
        (b"", b"null", b"[]", b'"text"', b"12", b"{", b"{}{}", b"// {}", b"\xef\xbb\xbf{}", b"{'a': 1}")
    )


def _escape(choose: random.Random, path: str) -> bytes:
    data = json.dumps(valid(path)).encode()
    return data.replace(b"Hello", choose.choice((rb"\u12", rb"\x41", rb"\ud800\u", b"a\nb", b"a\x00b", b"\\")))


def _control(choose: random.Random, path: str) -> bytes:
    """A well-formed request with unsupported or invalid values."""
    wrong = choose.choice(({"model": "no-such-model\x00"}, {"messages": []}, {"messages": [{"role": "\ud800"}]}))
    if path in ("/v1/completions", "/tokenize"):
        wrong = {"prompt": [10**30], "messages": _HELLO}
    return json.dumps({**valid(path), **wrong}).encode()


_BODIES: dict[str, Callable[[random.Random, str], bytes]] = {
    "broken UTF-8": _broken_text,
    "truncated": _truncated,
    "deep": _deep,
    "deep schema": _deep_schema,
    "number": _number,
    "wrong type": _type,
    "noise": _noise,
    "no object": _value,
    "bad escape": _escape,
    "impossible": _control,
}
if sys.version_info >= (3, 12):
    del _BODIES["deep schema"]  # that Python encodes and compiles schemas of such depths


def streams(seed: int) -> Iterator[tuple[str, bytes]]:
    """Yields (kind, bytes to send after connecting) without end. Some kinds are incomplete requests."""
    choose = random.Random(seed)
    body = json.dumps(valid(PATHS[0])).encode()

    def head(*lines: str, path: str = PATHS[0]) -> bytes:
        return "\r\n".join((f"POST {path} HTTP/1.1", "host: localhost", *lines, "", "")).encode("latin-1")

    length = f"content-length: {len(body)}"
    while True:
        yield "noise", choose.randbytes(choose.randrange(1, 2000))
        yield "TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + choose.randbytes(500)
        yield "HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + choose.randbytes(20)
        yield "length too short", head(f"content-length: {choose.randrange(1, len(body))}") + body
        yield "length too long", head(f"content-length: {len(body) + choose.randrange(1, 1 << 40)}") + body
        yield (
            "length no number",
            head(f"content-length: {choose.choice(('-5', '1e3', 'ten', '0x1f', '9' * 40))}") + body,
        )
        yield "two lengths", head(length, "content-length: 3") + body
        yield "both framings", head(length, "transfer-encoding: chunked") + b"5\r\nhello\r\n0\r\n\r\n"
        yield (
            "bad chunk",
            head("transfer-encoding: chunked") + choose.choice((b"zz\r\n", b"-1\r\n", b"5\r\nhelloworld")),
        )
        yield "long line", b"GET /" + b"a" * choose.choice((70_000, 200_000)) + b" HTTP/1.1\r\n\r\n"
        yield "long head", head(*(f"x-{number}: {'v' * 1000}" for number in range(200)))
        yield "NUL in head", head("x-name: a\x00b", length) + body
        yield "half a head", head(length)[: choose.randrange(1, 60)]
        yield "half a body", head(length) + body[: choose.randrange(len(body))]
        yield "pipelined", b"".join((head(length) + b"{" * len(body)) for _ in range(3))
        yield "odd path", head(length, path="/%ff%fe%00/../" + "é" * 5) + body
        yield "odd method", b"BREW " + head(length)[5:] + body
