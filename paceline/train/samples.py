"""Training samples on disk: token sequences of which some spans are supervised, in one file that only ever grows."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from paceline.errors import InputError

_MAGIC = b"paceline samples 1\n"
_RECORD = struct.Struct("<IIIH")  # CRC-32 of the rest, tokens, supervised spans, bytes of the task
_KEY_BYTES = 16
_HELD_OUT = 20  # one prompt in so many is held out
_LISTED = 10  # bad samples of each kind that are named
LEAST_OUTPUT = 8  # supervised tokens below which a sample is not worth its prompt


@dataclass(frozen=True)
class Sample:
    """One sequence. `spans` are the supervised parts of `tokens` (uint32), as (first, last + 1): the target's own output.

    `key` identifies the prompt and how it was continued; `prompt_key` the prompt alone, which decides the split.
    """

    prompt_key: bytes
    task: str
    tokens: Any
    spans: tuple[tuple[int, int], ...]
    variant: str = ""

    @property
    def key(self) -> bytes:
        return digest(self.prompt_key, self.variant.encode())

    @property
    def held_out(self) -> bool:
        """Whether the sample is for evaluation alone; a prompt's samples are all on one side."""
        return int.from_bytes(self.prompt_key[:4], "little") % _HELD_OUT == 0

    @property
    def num_supervised(self) -> int:
        """Tokens that are predicted; the first of a sequence has nothing before it."""
        return sum(last - max(first, 1) for first, last in self.spans if last > 1)


def digest(*parts: bytes) -> bytes:
    """16 bytes that name `parts`."""
    state = hashlib.blake2b(digest_size=_KEY_BYTES)
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.digest()


def prompt_key(value: Any) -> bytes:
    """The key of a prompt: of its text, or of its messages as JSON."""
    return digest(json.dumps(value, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass"))


class SampleWriter:
    """Appends to a file of samples. A record that a kill has cut short is removed when the file is opened again."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        """`about` says what made the samples (the target's identity). Raises InputError where the file's says otherwise."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        new = not path.exists() or path.stat().st_size == 0
        if not new:
            found, _, end = _scan(path)
            if found != about:
                raise InputError(f"the samples in {path} were made otherwise: {found}, not {about}; give another file")
            with path.open("r+b") as file:
                file.truncate(end)
        self._file: BinaryIO = path.open("ab")
        if new:
            self._file.write(_MAGIC + json.dumps(about).encode() + b"\n")
            self._file.flush()

    def add(self, sample: Sample) -> None:
        """Appends one sample; `flush` makes it safe."""
        task, variant = sample.task.encode(), sample.variant.encode()
        label = task + b"\0" + variant
        spans = np.array(sample.spans, dtype="<u4").tobytes()
        body = sample.prompt_key + label + spans + np.asarray(sample.tokens, dtype="<u4").tobytes()
        head = _RECORD.pack(0, len(sample.tokens), len(sample.spans), len(label))[4:]
        self._file.write(zlib.crc32(head + body).to_bytes(4, "little") + head + body)

    def flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self.flush()
        self._file.close()

    def __enter__(self) -> SampleWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def keys_in(path: Path) -> set[bytes]:
    """The keys of all samples of a file."""
    return {sample.key for sample in read_samples(path)} if path.exists() else set()


def read_samples(path: Path) -> list[Sample]:
    """The samples of a file; tokens are views of one buffer. A record that a kill has cut short at the end is left out.

    Raises InputError for a file that is missing, of another kind or damaged.
    """
    return _scan(path)[1]


def read_about(path: Path) -> dict[str, Any]:
    """What made a file's samples. Raises InputError for a file that is missing or of another kind."""
    try:
        with path.open("rb") as file:
            if file.readline(len(_MAGIC)) != _MAGIC:
                raise InputError(f"{path} is no file of training samples")
            return dict(json.loads(file.readline()))
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"the samples in {path} cannot be read: {error}") from error


def _scan(path: Path) -> tuple[dict[str, Any], list[Sample], int]:
    about = read_about(path)
    data = path.read_bytes()
    start = data.index(b"\n", len(_MAGIC)) + 1
    samples = []
    for sample, end in _records(path, data, start):
        samples.append(sample)
        start = end
    return about, samples, start


def _records(path: Path, data: bytes, start: int) -> Iterator[tuple[Sample, int]]:
    """The whole records from `start` on, each with its end. Ends at one that the file's end cuts short.

    Raises InputError for a damaged one.
    """
    number = 0
    while start + _RECORD.size <= len(data):
        checksum, num_tokens, num_spans, num_label = _RECORD.unpack_from(data, start)
        place = start + _RECORD.size
        end = place + _KEY_BYTES + num_label + 8 * num_spans + 4 * num_tokens
        if end > len(data):
            return
        number += 1
        if zlib.crc32(data[start + 4 : end]) != checksum:
            raise InputError(
                f"record {number} of {path}, at byte {start}, is damaged: write the samples anew, "
                "or cut the file there to keep those before it"
            )
        key = data[place : place + _KEY_BYTES]
        place += _KEY_BYTES
        task, _, variant = data[place : place + num_label].decode().partition("\0")
        place += num_label
        spans = np.frombuffer(data, "<u4", 2 * num_spans, place).reshape(-1, 2)
        tokens = np.frombuffer(data, "<u4", num_tokens, place + 8 * num_spans)
        yield Sample(key, task, tokens, tuple((int(a), int(b)) for a, b in spans), variant), end
        start = end


@dataclass
class Samples:
    """The samples that one run uses, in the split `train` and `held_out`, none longer than `length` tokens.

    `dropped` counts samples left out, and `cut` those whose end was cut off, by reason; `listed` names the first of each.
    """

    train: list[Sample] = field(default_factory=list)
    held_out: list[Sample] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    cut: int = 0
    listed: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def usable(
        cls, samples: Iterable[Sample], length: int, vocab_size: int, held_out: Iterable[Sample] | None = None
    ) -> Samples:
        """Sorts samples into the splits; with `held_out` these are one split, and `samples` of other prompts the other.

        Samples without supervised tokens, with a prompt that fills `length`, or with a token outside the vocabulary are
        dropped; the end of one that is too long is cut off. Raises InputError where no supervised token is left.
        """
        result = cls()
        held_out = None if held_out is None else list(held_out)
        kept_away = {each.prompt_key for each in held_out or ()}
        for split, part in ((None if held_out is None else False, samples), (True, held_out or ())):
            for sample in part:
                fitted, reason = _fitted(sample, length, vocab_size)
                if split is False and sample.prompt_key in kept_away:
                    fitted, reason = None, "whose prompt is held out"
                if fitted is None:
                    result._drop(sample, reason)
                    continue
                result.cut += fitted is not sample
                away = fitted.held_out if split is None else split
                (result.held_out if away else result.train).append(fitted)
        if not any(sample.num_supervised for sample in result.train):
            reasons = "; ".join(f"{count} {reason}" for reason, count in result.dropped.items())
            raise InputError(
                f"no sample has a token to learn from, so there is nothing to train on: {reasons or 'there are no samples'}"
            )
        return result

    def _drop(self, sample: Sample, reason: str) -> None:
        self.dropped[reason] += 1
        listed = self.listed.setdefault(reason, [])
        if len(listed) < _LISTED:
            listed.append(sample.key.hex())

    def counts(self) -> dict[str, Any]:
        """What a card says of them."""
        return {
            "train": len(self.train),
            "held_out": len(self.held_out),
            "tokens": sum(len(each.tokens) for each in self.train),
            "supervised_tokens": sum(each.num_supervised for each in self.train),
            "by_task": dict(Counter(each.task for each in self.train).most_common()),
            "by_variant": dict(Counter(each.variant.split(" ")[0] for each in self.train).most_common()),
            "cut": self.cut,
            "dropped": dict(self.dropped),
            "listed": self.listed,
        }


def _fitted(sample: Sample, length: int, vocab_size: int) -> tuple[Sample | None, str]:
    """The sample, cut to `length`, or None and the reason for which it cannot be used."""
    if not sample.num_supervised:
        return None, "with an empty loss mask"
    if len(sample.tokens) and int(sample.tokens.max()) >= vocab_size:
        return None, "with a token outside the vocabulary"
    if len(sample.tokens) <= length:
        return sample, ""
    spans = tuple((first, min(last, length)) for first, last in sample.spans if first < length)
    short = Sample(sample.prompt_key, sample.task, sample.tokens[:length], spans, sample.variant)
    if short.num_supervised < LEAST_OUTPUT:
        return None, f"whose prompt leaves fewer than {LEAST_OUTPUT} tokens of {length} for the output"
    return short, ""
