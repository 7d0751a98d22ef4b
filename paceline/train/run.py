"""One run of training in a folder: it begins, goes on from saved weights or continues; writes drafter, card and plots."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from paceline.drafters.checkpoint import (
    DraftCheckpoint,
    check_target,
    read_checkpoint,
    tensor_shapes,
    write_checkpoint,
)
from paceline.drafters.config import KINDS, DraftConfig
from paceline.errors import BadDrafter, ConfigError
from paceline.models.config import ModelConfig
from paceline.models.decoder import Decoder
from paceline.train.capture import Capture
from paceline.train.card import embedded, read_sources, write_card
from paceline.train.dflash import BlockObjective, BlockShape, DFlashTrainee, dflash_config, mask_token
from paceline.train.eagle3 import Eagle3Trainee, eagle3_config
from paceline.train.losses import Objective
from paceline.train.packing import Packing
from paceline.train.parallel import Group
from paceline.train.report import write_plots
from paceline.train.samples import Sample, Samples, read_about, read_samples
from paceline.train.state import TrainState, plain
from paceline.train.trainer import Trainee, Trainer, TrainSettings
from paceline.train.vocabulary import draft_vocabulary, vocabulary_share

DRAFTER_FILE = "drafter.safetensors"
DRAFT_VOCAB_SIZE = 16384

_OWN_LOSS = "a block drafter has a loss of its own (train/dflash.py): --loss is of EAGLE-3 drafters"


@dataclass(frozen=True)
class DrafterOptions:
    """The drafter's own shapes. Sizes that are None are those of the drafter that is continued; of a new one they are
    DRAFT_VOCAB_SIZE and the target's. `steps` are the drafted positions trained for, which make a block drafter's block.
    `layers`, `markov_rank` and `kv_heads` are a block drafter's; `train.dflash.usual_kv_heads` is the default of the last.
    """

    kind: str = "eagle3"
    draft_vocab_size: int | None = None
    intermediate_size: int | None = None
    steps: int = 7
    layers: int = 2
    markov_rank: int = 128
    kv_heads: int | None = None

    def __post_init__(self) -> None:
        """Raises ConfigError for a kind or a size that there is not."""
        if self.kind not in KINDS:
            raise ConfigError(f"there is no trainer of {self.kind!r} drafters; known: {', '.join(KINDS)}")
        sizes = (self.draft_vocab_size, self.intermediate_size, self.steps, self.layers, self.kv_heads)
        if min(1 if size is None else size for size in sizes) < 1 or self.markov_rank < 0:
            raise ConfigError("a drafter's sizes and its drafted positions must be 1 or more, markov_rank 0 or more")
        if self.kind == "dflash" and self.steps < 2:
            raise ConfigError("a block has 2 tokens or more")


@dataclass(frozen=True)
class Target:
    """The model that is drafted for. `identity` and `vocabulary` are the digests that the drafter is bound to."""

    model: Decoder
    name: str
    identity: str
    eos_tokens: Sequence[int]
    vocabulary: str = ""

    @property
    def digests(self) -> tuple[str, str]:
        return self.identity, self.vocabulary


@dataclass
class TrainingRun:
    """A run folder: samples*.bin, state.pt, log.jsonl, the drafter, card.json, card.md, acceptance.svg and .png.

    `start` is a drafter whose weights a new run begins with. Its draft vocabulary stays, what it has seen counts, and the
    optimizer and the schedule begin anew. A folder with a state continues from that.
    """

    folder: Path
    target: Target
    options: DrafterOptions
    settings: TrainSettings
    group: Group = field(default_factory=Group)
    start: Path | None = None

    def train(self, sample_files: Sequence[Path], held_out_files: Sequence[Path] = ()) -> dict[str, Any]:
        """Trains on the files' samples and returns the card. Evaluates on those of `held_out_files`, if there are any,
        else on the samples of one in twenty prompts.

        Raises InputError for samples with nothing to learn from, ConfigError for options other than those of the state or
        of `start`, and BadDrafter where `start` is damaged or another target's.
        """
        target, options = self.target, self.options
        check_run(target.model.config, options, self.settings, self.group.size, [*sample_files, *held_out_files])
        held_out = _read(held_out_files) if held_out_files else None
        samples = Samples.usable(
            _read(sample_files), self.settings.row_length, target.model.config.vocab_size, held_out
        )
        state, config = self.state(samples.train)
        self._show(samples, state)
        head = target.model.head_rows(state.draft_tokens.to(target.model.device))
        trainee = make_trainee(config, target.model.embedding, head, options.steps, self.settings.objective)
        capture = Capture(target.model, config.features, state.draft_tokens)
        if not state.tensors:
            state.tensors = self._initial(trainee, capture, samples)
        trainer = Trainer(trainee, capture, samples, self.settings, state, self.folder, self.group)
        started = time.monotonic()
        trainer.train()
        result = trainer.evaluate()
        trainer.save()
        card = self._card(config, state, samples, result, sample_files)
        card["run_minutes"] = round((time.monotonic() - started) / 60, 2)
        if self.group.rank == 0:
            self._write(config, state, card)
        return card

    def _initial(self, trainee: Trainee, capture: Capture, samples: Samples) -> dict[str, torch.Tensor]:
        settings, tasks = self.settings, sorted({each.task for each in samples.train})
        packing = Packing(samples.train, settings.row_length, settings.seed, tasks)
        rows, _ = packing.take((0, 0), 1)
        return self.group.share(trainee.initial(settings.seed, lambda: capture(packing.pack(rows))))

    def state(self, samples: Sequence[Sample]) -> tuple[TrainState, DraftConfig]:
        """The state to continue, one with the tensors of `start`, or a new one without tensors."""
        state = TrainState.load(self.folder / "state.pt")
        if state is not None:
            config = self._drafter_config(samples, state.config)
            _refuse_changes(f"{self.folder} trains another drafter", state.config, config)
            return state, config
        if self.start is not None:
            return self._started(self.start, samples)
        config = self._drafter_config(samples, {})
        vocab_size = self.target.model.config.vocab_size
        always = [each for each in self.target.eos_tokens if 0 <= each < vocab_size]
        chosen, share = draft_vocabulary(samples, config.draft_vocab_size, vocab_size, always)
        return TrainState({}, torch.from_numpy(chosen), plain(config), vocabulary_share=share), config

    def _started(self, path: Path, samples: Sequence[Sample]) -> tuple[TrainState, DraftConfig]:
        """A state with the weights of the drafter at `path`."""
        drafter, config = read_start(path, self.target.model.config, self.target.digests, self.options)
        tokens = drafter.draft_tokens
        if tokens is None:
            tokens = torch.arange(config.layer.vocab_size)
        seen = {name: _number(drafter, name) for name in ("tokens", "supervised", "epochs", "minutes")}
        state = TrainState(
            {name: each.float() for name, each in drafter.tensors.items()},
            tokens,
            plain(config),
            place=(math.ceil(seen["epochs"]), 0),  # an order of the samples that it has not seen
            tokens=int(seen["tokens"]),
            supervised=int(seen["supervised"]),
            seconds=60 * seen["minutes"],
            tokens_before=int(seen["tokens"]),
            epochs_before=seen["epochs"],
            vocabulary_share=vocabulary_share(samples, tokens.numpy()),
        )
        return state, config

    def _drafter_config(self, samples: Sequence[Sample], before: Mapping[str, Any]) -> DraftConfig:
        """The drafter that the options ask for; `before` is the config of the one that is continued, {} for none."""
        target, options = self.target, self.options
        mask = max(0, before.get("mask_token", 0))
        if options.kind == "dflash" and before.get("kind") != "dflash":
            mask = mask_token(target.model.embedding, samples)
        return drafter_config(target.model.config, target.digests, options, before, mask)

    def _show(self, samples: Samples, state: TrainState) -> None:
        if self.group.rank:
            return
        data = samples.counts()
        print(
            f"data: {data['train']:,} samples of {data['tokens']:,} tokens, {data['supervised_tokens']:,} to predict, "
            f"{state.vocabulary_share:.2%} of them can be drafted; {data['held_out']:,} samples held out, {data['cut']:,} cut",
            file=sys.stderr,
        )
        for reason, count in samples.dropped.items():
            listed = ", ".join(samples.listed[reason])
            print(f"left out: {count:,} samples {reason}: {listed}", file=sys.stderr)

    def _card(
        self,
        config: DraftConfig,
        state: TrainState,
        samples: Samples,
        result: dict[str, Any] | None,
        files: Sequence[Path],
    ) -> dict[str, Any]:
        data = samples.counts()
        epochs = state.epochs_before + (state.tokens - state.tokens_before) / max(1, data["tokens"])
        return {
            "kind": config.kind,
            "target": self.target.name,
            "target_digest": self.target.identity,
            "tokens": state.tokens,
            "supervised": state.supervised,
            "epochs": round(epochs, 2),
            "steps": state.steps,
            "minutes": round(state.seconds / 60, 2),
            "tokens_before": state.tokens_before,
            "parameters": sum(each.numel() for each in state.tensors.values()),
            "draft_vocab_size": config.draft_vocab_size,
            "draft_vocab_share": state.vocabulary_share,
            "settings": plain(self.settings),
            "options": plain(self.options),
            "config": plain(config),
            "data": data,
            "sources": read_sources([self.folder, *(file.parent for file in files)]),
            "evaluation": result,
        }

    def _write(self, config: DraftConfig, state: TrainState, card: dict[str, Any]) -> None:
        tensors = {name: each.to(torch.bfloat16) for name, each in state.tensors.items()}
        whole = config.draft_vocab_size == config.layer.vocab_size
        draft_tokens = None if whole else state.draft_tokens
        write_checkpoint(self.folder / DRAFTER_FILE, config, tensors, draft_tokens, card=embedded(card))
        write_card(self.folder, card)
        write_plots(self.folder)


def check_run(
    target: ModelConfig, options: DrafterOptions, settings: TrainSettings, num_processes: int, files: Sequence[Path]
) -> None:
    """Raises ConfigError for options and settings that cannot be trained with, InputError for files that are no samples."""
    if options.kind == "dflash" and settings.objective != Objective():
        raise ConfigError(_OWN_LOSS)
    if options.kv_heads and target.num_heads % options.kv_heads:
        raise ConfigError(f"{target.num_heads} heads cannot share {options.kv_heads} heads of keys and values evenly")
    check_row_length(settings.row_length, target)
    settings.check_shared(num_processes)
    for file in files:
        read_about(file)


def check_row_length(row_length: int, target: ModelConfig) -> None:
    """Raises ConfigError for rows beyond the positions that the target knows."""
    if row_length > target.max_positions:
        raise ConfigError(
            f"rows of {row_length:,} tokens are longer than the target's {target.max_positions:,} positions"
        )


def read_start(
    path: Path, target: ModelConfig, digests: tuple[str, str], options: DrafterOptions
) -> tuple[DraftCheckpoint, DraftConfig]:
    """The drafter at `path` to go on from, and its config as the options have it. `digests` are `Target.digests`.

    Raises BadDrafter for a damaged drafter or another target's, ConfigError for options other than its own.
    """
    drafter = read_checkpoint(path, target.num_layers)
    check_target(drafter, target, digests[0], vocabulary=digests[1])
    before = plain(drafter.config)
    config = drafter_config(target, digests, options, before, max(0, before.get("mask_token", 0)))
    _refuse_changes(f"{path} is another drafter", before, config)
    own = sorted(drafter.tensors.keys() - tensor_shapes(config)[0].keys())
    if own:
        raise BadDrafter(f"{path} has {', '.join(own)}; training goes on with the target's embeddings and head alone")
    return drafter, config


def drafter_config(
    target: ModelConfig, digests: tuple[str, str], options: DrafterOptions, before: Mapping[str, Any], mask: int
) -> DraftConfig:
    """The drafter that the options ask for; `before` is the config of the one that is continued, {} for none.

    `digests` are `Target.digests`; `mask` is a block drafter's mask token.
    """
    size = options.draft_vocab_size or before.get("draft_vocab_size") or DRAFT_VOCAB_SIZE
    wide = options.intermediate_size or before.get("layer", {}).get("intermediate_size")
    size = min(size, target.vocab_size)
    if options.kind == "eagle3":
        config = eagle3_config(target, digests[0], size, wide)
    else:
        heads = options.kv_heads or before.get("layer", {}).get("num_kv_heads")
        shape = BlockShape(options.layers, options.steps, options.markov_rank, heads)
        config = dflash_config(target, digests[0], size, wide, mask, shape)
    return dataclasses.replace(config, vocabulary_digest=digests[1])


def make_trainee(
    config: DraftConfig,
    embedding: torch.Tensor,
    head: torch.Tensor,
    steps: int,
    objective: Objective,
    of_blocks: BlockObjective | None = None,
) -> Trainee:
    """The part of a trainer that is of the drafter's kind; embedding [V, H] and head [draft vocabulary, H] are those that it
    uses. `steps` and `objective` are EAGLE-3's, `of_blocks` a block drafter's. Raises ConfigError for a loss of another kind.
    """
    if config.kind == "dflash":
        if objective != Objective():
            raise ConfigError(_OWN_LOSS)
        return DFlashTrainee(config, embedding, head, of_blocks)
    return Eagle3Trainee(config, embedding, head, steps, objective)


def _refuse_changes(what: str, before: Mapping[str, Any], now: DraftConfig) -> None:
    """Raises ConfigError unless a config as `plain` gives it is that of `now`. Digests may be unknown before."""
    old, new = _flat(before), _flat(plain(now))
    unknown = {name for name in new if name.endswith("_digest") and not old.get(name)}
    changed = [name for name in new if new[name] != old.get(name) and name not in unknown]
    if changed:
        name = changed[0]
        raise ConfigError(
            f"{what}: its {name} is {old.get(name)!r}, not {new[name]!r}; give the options that it began with, "
            "or begin anew in another folder"
        )


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    layer = {f"layer.{name}": each for name, each in values["layer"].items()}
    return {**{name: each for name, each in values.items() if name != "layer"}, **layer}


def _number(drafter: DraftCheckpoint, name: str) -> float:
    """A number on the drafter's card; 0 where it has none."""
    value = drafter.card.get(name)
    return float(value) if isinstance(value, int | float) else 0.0


def _read(files: Sequence[Path]) -> list[Sample]:
    """One sample of each key, in the order of the keys: the order of generation must not matter."""
    samples = [sample for file in files for sample in read_samples(file)]
    return [sample for _, sample in sorted({each.key: each for each in samples}.items())]
