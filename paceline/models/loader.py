"""From a checkpoint's stored tensors to the weights that a model's blocks multiply by, whole or as one shard."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from paceline.errors import BadWeights
from paceline.models.config import Family, ModelConfig, Shard
from paceline.models.families import WHOLE
from paceline.models.stored import Job, StoredTensor, as_stored, run_ahead
from paceline.ops.weight import prepare, prepare_experts

_MOST_NAMED = 20
# Tensors that some checkpoints carry and no model needs: the head of a model with tied embeddings, and RoPE's frequencies.
_HARMLESS = ("rotary_emb.inv_freq", "lm_head.weight")


class Form(Enum):
    """What a part becomes: a plain tensor, a weight, a gated weight, or one weight (or gated weight) per expert."""

    TENSOR = "tensor"
    WEIGHT = "weight"
    GATED = "gated"
    EXPERTS = "experts"
    GATED_EXPERTS = "gated experts"


_PER_EXPERT = (Form.EXPERTS, Form.GATED_EXPERTS)


class Split(Enum):
    """How tensor parallelism divides a part: not at all, or every tensor of it by rows or by columns."""

    NONE = "none"
    ROWS = "rows"
    COLUMNS = "columns"


@dataclass(frozen=True)
class Part:
    """One attribute of a block: the tensors of `roles` (keys of Family.names), one below the other."""

    roles: tuple[str, ...]
    form: Form = Form.TENSOR
    split: Split = Split.NONE
    bias: bool = False


@dataclass(frozen=True)
class Wanted:
    """A part of a certain layer. `stems` are its tensors' names without the ending, by expert (else in one group)."""

    part: Part
    stems: tuple[tuple[str, ...], ...]

    @property
    def names(self) -> list[str]:
        endings = ("weight", "bias") if self.part.bias else ("weight",)
        return [f"{stem}.{ending}" for group in self.stems for stem in group for ending in endings]


def of_layer(part: Part, layer: int, family: Family, config: ModelConfig) -> Wanted:
    """`part` of a layer's block."""
    stems = tuple(f"model.layers.{layer}.{family.names[role][0]}" for role in part.roles)
    if part.form not in _PER_EXPERT:
        return Wanted(part, (stems,))
    count = config.experts.num_experts if config.experts else 0
    return Wanted(part, tuple(tuple(stem.replace("{expert}", str(each)) for stem in stems) for each in range(count)))


def of_model(role: str, form: Form = Form.TENSOR) -> Wanted:
    """A tensor outside the layers: a key of `families.WHOLE`."""
    return Wanted(Part((role,), form), ((WHOLE[role][0],),))


@dataclass(frozen=True)
class _Piece:
    """The rows and columns of a stored tensor that this shard needs; a vector has no columns."""

    name: str
    stored: StoredTensor
    rows: slice
    columns: slice | None

    @property
    def num_rows(self) -> int:
        return self.rows.stop - self.rows.start

    @property
    def width(self) -> int:
        return 1 if self.columns is None else self.columns.stop - self.columns.start


def _filling(target: Tensor, pieces: list[_Piece]) -> list[Job]:
    """The jobs that decode `pieces` into `target`, one below the other."""
    jobs: list[Job] = []
    first = 0
    for each in pieces:
        part = target[first : first + each.num_rows]
        if part.shape[0] != each.num_rows or part[0].numel() != each.width:
            raise BadWeights(f"tensor {each.name!r} has another shape than its neighbours: {list(each.stored.shape)}")
        jobs += each.stored.jobs(part, each.rows, each.columns or slice(0, 1))
        first += each.num_rows
    return jobs


class Loader:
    """Decodes the tensors of a checkpoint that a model needs, joins them and moves them to the device."""

    def __init__(
        self,
        tensors: Iterable[tuple[str, StoredTensor | Tensor]],
        device: torch.device,
        dtype: torch.dtype | None = None,
        shard: Shard | None = None,
    ) -> None:
        """`dtype` None keeps that of each tensor."""
        self._stored = {name: as_stored(tensor) for name, tensor in tensors}
        self._device, self._dtype, self._shard = device, dtype, shard or Shard()

    def load(self, wanted: Sequence[Wanted]) -> Iterator[Any]:
        """The parts in order: a Tensor, a Weight or ExpertWeights each, by their form; decoded ahead on every core.

        Raises BadWeights for tensors that are missing, and for those that the model has no place for: a checkpoint with more
        tensors is another model.
        """
        names = [name for each in wanted for name in each.names]
        missing = [name for name in names if name not in self._stored]
        if missing:
            more = f" and {len(missing) - _MOST_NAMED} more" if len(missing) > _MOST_NAMED else ""
            raise BadWeights(f"the checkpoint lacks the tensors {', '.join(missing[:_MOST_NAMED])}{more}")
        left = [name for name in self._stored if not name.endswith(_HARMLESS)]
        left = sorted(set(left) - set(names), key=left.index)
        if left:
            raise BadWeights(f"the checkpoint has {len(left)} tensors this model has no place for, first {left[0]!r}")
        return (self._finished(*each) for each in run_ahead(self._work(wanted)))

    def _work(self, wanted: Sequence[Wanted]) -> Iterator[tuple[tuple[Form, Tensor, Tensor | None], list[Job], int]]:
        """Each part's memory, and the jobs that fill it."""
        for each in wanted:
            part = each.part
            groups = [[self._piece(f"{stem}.weight", part.split) for stem in stems] for stems in each.stems]
            matrix = self._empty(groups[0], len(groups) if part.form in _PER_EXPERT else None)
            jobs = []
            for index, pieces in enumerate(groups):
                jobs += _filling(matrix[index] if part.form in _PER_EXPERT else matrix, pieces)
            bias = None
            if part.bias:
                pieces = [self._piece(f"{stem}.bias", part.split) for stem in each.stems[0]]
                bias = self._empty(pieces)
                jobs += _filling(bias, pieces)
            yield (part.form, matrix, bias), jobs, sum(map(len, groups))

    def _piece(self, name: str, split: Split) -> _Piece:
        stored = self._stored.pop(name)
        whole = [slice(0, size) for size in stored.shape]
        if split is Split.ROWS:
            whole[0] = self._shard.part(stored.shape[0])
        elif split is Split.COLUMNS and len(whole) > 1:
            whole[1] = self._shard.part(stored.shape[1])
        return _Piece(name, stored, whole[0], whole[1] if len(whole) > 1 else None)

    def _empty(self, pieces: list[_Piece], num_experts: int | None = None) -> Tensor:
        """Memory for pieces one below the other; for `num_experts` such stacks where it is given."""
        first = pieces[0]
        for each in pieces:
            if each.width != first.width:
                raise BadWeights(
                    f"tensors {first.name!r} and {each.name!r} have {first.width} and {each.width} columns"
                )
        sizes = [sum(each.num_rows for each in pieces), *([] if first.columns is None else [first.width])]
        return torch.empty(
            [*([] if num_experts is None else [num_experts]), *sizes], dtype=self._dtype or first.stored.dtype
        )

    def _finished(self, form: Form, matrix: Tensor, bias: Tensor | None) -> Any:
        matrix = matrix.to(self._device)
        if form is Form.TENSOR:
            return matrix
        if form in _PER_EXPERT:
            return prepare_experts(matrix, gated=form is Form.GATED_EXPERTS)
        return prepare(matrix, None if bias is None else bias.to(self._device), gated=form is Form.GATED)
