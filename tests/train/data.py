"""Samples, a target and a run of training for tests of the trainer. As a program it is one process of a run by torchrun."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paceline.models.decoder import Decoder
from paceline.train.parallel import Group
from paceline.train.run import DrafterOptions, Target, TrainingRun
from paceline.train.samples import Sample, SampleWriter, digest
from paceline.train.trainer import TrainSettings
from tests.tiny import EOS, random_tensors, tiny_config

ABOUT = {"target": "tiny"}
SETTINGS = TrainSettings(tokens=6000, batch_rows=4, micro_rows=2, row_length=96, log_seconds=1e9, save_minutes=1e9)
OPTIONS = DrafterOptions(draft_vocab_size=64, intermediate_size=48, steps=3)


def random_samples(count: int, length: int = 40, seed: int = 0, vocab_size: int = 256) -> list[Sample]:
    """Random tokens, the first third a prompt."""
    draw = np.random.default_rng(seed)
    samples = []
    for number in range(count):
        size = int(draw.integers(length // 2, length + 1))
        tokens = draw.integers(0, vocab_size, size).astype(np.uint32)
        samples.append(Sample(digest(f"{seed} {number}".encode()), "code", tokens, ((size // 3, size),)))
    return samples


def write(path: Path, samples: list[Sample]) -> Path:
    with SampleWriter(path, ABOUT) as writer:
        for sample in samples:
            writer.add(sample)
    return path


def tiny_target(**changes: Any) -> Decoder:
    config = tiny_config(num_layers=6, **changes)
    return Decoder(config, random_tensors(config), torch.device("cpu"))


def tiny_run(
    folder: Path, group: Group | None = None, options: DrafterOptions = OPTIONS, **changes: Any
) -> TrainingRun:
    target = Target(tiny_target(), "tiny", "identity", (EOS,))
    return TrainingRun(folder, target, options, dataclasses.replace(SETTINGS, **changes), group or Group())


if __name__ == "__main__":
    joined = Group.join()
    torch.set_num_threads(1)
    tiny_run(Path(sys.argv[1]), joined, micro_rows=1).train([Path(sys.argv[2])])
    joined.leave()
