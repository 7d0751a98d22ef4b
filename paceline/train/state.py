"""Everything that a run of training continues from, in one file that is replaced as a whole."""

from __future__ import annotations

import os
import pickle
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paceline.errors import InputError


@dataclass
class TrainState:
    """Weights, the optimizer's state and the place in the data.

    place        (epoch, row) of the next row
    tokens       tokens of all rows so far, over all runs; `supervised` those that were predicted
    evaluated    `tokens` at the last evaluation
    seconds      spent training, over all runs
    tokens_before, epochs_before  what a drafter had seen whose weights this began with
    vocabulary_share  of supervised tokens that can be drafted
    """

    tensors: dict[str, Tensor]
    draft_tokens: Tensor
    config: dict[str, Any]
    optimizer: dict[str, Any] = field(default_factory=dict)
    random: Tensor | None = None
    place: tuple[int, int] = (0, 0)
    steps: int = 0
    tokens: int = 0
    supervised: int = 0
    evaluated: int = 0
    seconds: float = 0.0
    tokens_before: int = 0
    epochs_before: float = 0.0
    vocabulary_share: float = 0.0

    def save(self, path: Path) -> None:
        """Writes the file beside, then puts it in place: a kill leaves the old one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        with partial.open("wb") as file:
            torch.save(values, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> TrainState | None:
        """The saved state, on the CPU; None where there is none yet. Raises InputError for a damaged file."""
        if not path.exists():
            return None
        try:
            values = torch.load(path, map_location="cpu", weights_only=True)
            return cls(**values)
        except (pickle.UnpicklingError, RuntimeError, TypeError, OSError, EOFError, ValueError) as error:
            raise InputError(f"the state in {path} cannot be read: {error}; delete it to begin again") from error


def plain(config: Any) -> dict[str, Any]:
    """A dataclass as values that `torch.load` reads without running code."""

    def simple(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: simple(each) for key, each in value.items()}
        if isinstance(value, (list, tuple, set, frozenset)):
            return [simple(each) for each in value]
        return value

    return dict(simple(asdict(config)))
