"""The file of samples, and what of it can be trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from paceline.errors import ConfigError, InputError
from paceline.train.samples import Sample, Samples, SampleWriter, digest, keys_in, read_about, read_samples
from paceline.train.vocabulary import draft_vocabulary
from tests.train.data import ABOUT, random_samples, write


def sample(size: int, *spans: tuple[int, int], key: bytes = b"k") -> Sample:
    return Sample(digest(key), "code", np.arange(size, dtype=np.uint32), spans)


def same(left: Sample, right: Sample) -> bool:
    return left.key == right.key and left.spans == right.spans and np.array_equal(left.tokens, right.tokens)


def test_samples_come_back_as_they_were_written(tmp_path: Path) -> None:
    written = [
        *random_samples(5),
        Sample(digest(b"x"), "tâche", np.arange(9, dtype=np.uint32), ((2, 4), (6, 9)), "t=0.7"),
    ]
    read = read_samples(write(tmp_path / "samples.bin", written))
    assert all(same(a, b) for a, b in zip(written, read, strict=True))
    assert (read[-1].task, read[-1].variant, read[-1].num_supervised) == ("tâche", "t=0.7", 5)


def test_a_record_that_was_cut_short_is_dropped_and_the_file_continues(tmp_path: Path) -> None:
    path = write(tmp_path / "samples.bin", random_samples(4))
    whole = path.read_bytes()
    for cut in (1, 7, 60):
        path.write_bytes(whole[:-cut])
        assert len(read_samples(path)) == 3
    write(path, random_samples(2, seed=1))
    keys = {each.key for each in [*random_samples(4)[:3], *random_samples(2, seed=1)]}
    assert keys_in(path) == keys


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "samples.bin", random_samples(4))
    whole = bytearray(path.read_bytes())
    whole[-300] ^= 1
    path.write_bytes(whole)
    with pytest.raises(InputError, match=r"record [123] of .*samples\.bin, at byte \d+, is damaged"):
        read_samples(path)
    with pytest.raises(InputError, match="is damaged"):
        SampleWriter(path, ABOUT)
    assert path.read_bytes() == whole
    with pytest.raises(InputError, match=r"cannot be read: .*none"):
        read_about(tmp_path / "none.bin")


def test_samples_of_another_target_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "samples.bin", random_samples(1))
    with pytest.raises(InputError, match="made otherwise"):
        SampleWriter(path, {**ABOUT, "target": "other"})
    path.write_text("no samples")
    with pytest.raises(InputError, match="no file of training samples"):
        read_samples(path)


def test_bad_samples_are_counted_and_long_ones_cut() -> None:
    good = [sample(40, (10, 40), key=bytes([number])) for number in range(40)]
    bad = [
        sample(30, key=b"empty"),
        sample(30, (0, 1), key=b"only the first"),
        sample(300, (290, 300), key=b"long prompt"),
        sample(300, (10, 300), key=b"long output"),
        Sample(digest(b"outside"), "code", np.array([1, 9999], dtype=np.uint32), ((0, 2),)),
    ]
    found = Samples.usable(good + bad, 100, 1000)
    assert found.dropped == {
        "with an empty loss mask": 2,
        "whose prompt leaves fewer than 8 tokens of 100 for the output": 1,
        "with a token outside the vocabulary": 1,
    }
    assert found.cut == 1 and max(len(each.tokens) for each in found.train + found.held_out) == 100
    assert sum(map(len, found.listed.values())) == sum(found.dropped.values())


def test_nothing_to_learn_from_stops_at_once() -> None:
    with pytest.raises(InputError, match="nothing to train on: 3 with an empty loss mask"):
        Samples.usable([sample(30, key=bytes([number])) for number in range(3)], 100, 256)
    with pytest.raises(InputError, match="there are no samples"):
        Samples.usable([], 100, 256)


def test_prompts_that_are_held_out_are_not_trained_on() -> None:
    every = random_samples(20)
    other = [Sample(each.prompt_key, each.task, each.tokens, each.spans, "t=0.7") for each in every[:5]]
    found = Samples.usable(every, 100, 256, other)
    assert (len(found.train), len(found.held_out)) == (15, 5)
    assert found.dropped == {"whose prompt is held out": 5}


def test_the_split_is_by_prompt() -> None:
    every = random_samples(400)
    found = Samples.usable(every, 100, 256)
    assert 5 < len(found.held_out) < 40 and len(found.train) + len(found.held_out) == 400
    other = [Sample(each.prompt_key, each.task, each.tokens, each.spans, "t=0.7") for each in every]
    assert [each.held_out for each in other] == [each.held_out for each in every]


def test_the_draft_vocabulary_is_what_outputs_hold_most_often() -> None:
    tokens = np.array([9, 9, 9, 1, 5, 5, 1, 7, 5, 3], dtype=np.uint32)
    chosen, share = draft_vocabulary([Sample(digest(b""), "", tokens, ((3, 10),))], 4, 20, [19])
    assert chosen.tolist() == [1, 3, 5, 19] and share == 6 / 7
    chosen, _ = draft_vocabulary([Sample(digest(b""), "", tokens, ((3, 10),))], 7, 20, [19])
    assert chosen.tolist() == [0, 1, 3, 5, 7, 9, 19]
    with pytest.raises(ConfigError, match="is not possible"):
        draft_vocabulary([], 21, 20, [19])
