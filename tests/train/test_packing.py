"""Rows of several documents."""

from __future__ import annotations

import itertools

import numpy as np

from paceline.train.packing import Packing
from paceline.train.samples import Sample, digest
from tests.train.data import random_samples


def test_every_sample_is_in_an_epoch_once_and_rows_do_not_overflow() -> None:
    samples = random_samples(200)
    packing = Packing(samples, 96, 0, ["code"])
    first, second = packing.epoch(0), packing.epoch(1)
    assert sorted(itertools.chain(*first)) == sorted(itertools.chain(*second)) == list(range(200))
    assert first != second and first == Packing(samples, 96, 0, ["code"]).epoch(0)
    used = [sum(len(samples[index].tokens) for index in row) for row in first]
    assert max(used) <= 96 and sum(used) / len(used) > 80


def test_taking_rows_in_parts_is_taking_them_at_once() -> None:
    packing = Packing(random_samples(30), 96, 3, ["code"])
    whole, _ = packing.take((0, 0), 40)
    place, parts = (0, 0), []
    for count in (1, 7, 20, 12):
        taken, place = packing.take(place, count)
        parts += taken
    assert parts == whole and place[0] >= 2


def test_packed_arrays_describe_the_documents() -> None:
    draw = np.random.default_rng(0)
    samples = [
        Sample(digest(bytes([n])), task, draw.integers(0, 99, size).astype(np.uint32), spans)
        for n, (task, size, spans) in enumerate(
            [("a", 10, ((4, 10),)), ("b", 12, ((0, 3), (8, 10))), ("a", 20, ((5, 6),)), ("b", 24, ((1, 24),))]
        )
    ]
    packing = Packing(samples, 24, 0, ["a", "b"])
    packed = packing.pack([[0, 1], [2], [3]])
    assert packed.tokens.shape == (3, 24) and packed.num_tokens == 66
    assert packed.bounds == [0, 10, 22, 24, 44, 48, 72]
    places = packed.places[packed.weights > 0].tolist()
    assert places == [*range(3, 9), 10, 11, 17, 18, 28, *range(48, 71)]
    assert packed.depths[:10].tolist() == [3, 4, 5, 6, 7, 8, 0, 1, 7, 8]
    assert packed.follows[:10].tolist() == [False, True, True, True, True, True, False, True, False, True]
    assert packed.tasks[: len(places)].tolist() == [0] * 6 + [1] * 4 + [0] + [1] * 23
    assert packed.num_supervised == packing.supervised([[0, 1], [2], [3]]) == len(places)
    flat = packed.documents.reshape(-1)
    for number, (first, last) in enumerate(zip(packed.bounds, packed.bounds[1:], strict=False)):
        assert set(flat[first:last].tolist()) == {number}
        assert packed.positions.reshape(-1)[first:last].tolist() == list(range(last - first))
