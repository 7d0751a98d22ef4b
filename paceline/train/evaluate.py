"""What a drafter's target would accept of its drafts, over samples that exist: no engine runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from paceline.drafters.checkpoint import DraftCheckpoint, check_target
from paceline.errors import ConfigError
from paceline.models.decoder import Decoder
from paceline.train.capture import Capture
from paceline.train.dflash import BlockObjective
from paceline.train.losses import Acceptance, Objective, summaries, summary
from paceline.train.packing import Packing
from paceline.train.run import Target, check_row_length, make_trainee
from paceline.train.samples import Sample, Samples
from paceline.train.trainer import measure

_ROWS = 4  # of samples at a time


def evaluate(
    drafter: DraftCheckpoint,
    target: Target,
    samples: Sequence[Sample],
    *,
    steps: int = 7,
    row_length: int = 2048,
    force: bool = False,
) -> dict[str, Any]:
    """Acceptance over the samples' supervised tokens, as a run of training evaluates it: see `losses.summary`.

    Every place of an output is a draft's root, and the text's own tokens are the draft's, so all texts are seen at once: a
    draft counts as far as its first choices are the target's and the text's. `steps` are the positions drafted by EAGLE-3; a
    block drafter has its own number. Raises BadDrafter for a drafter of another target (other weights of the same shapes pass
    with `force`), InputError where no sample has a token to predict, ConfigError for fewer than one step and rows that
    are longer than the target's positions.
    """
    if steps < 1:
        raise ConfigError("an evaluation needs one drafted position or more")
    check_row_length(row_length, target.model.config)
    model: Decoder = target.model
    config = drafter.config
    check_target(drafter, model.config, target.identity, force, target.vocabulary)
    usable = Samples.usable(samples, row_length, model.config.vocab_size, held_out=[])
    tensors = {name: each.to(model.device, model.dtype) for name, each in drafter.tensors.items()}
    draft_tokens = drafter.draft_tokens
    if draft_tokens is None:
        draft_tokens = torch.arange(config.layer.vocab_size)
    embedding = tensors.pop("embed_tokens.weight", model.embedding)
    own_head = tensors.pop("lm_head.weight", None)
    head = model.head_rows(draft_tokens.to(model.device)) if own_head is None else own_head
    trainee = make_trainee(config, embedding, head, steps, Objective(), BlockObjective(share=1.0))
    tasks = sorted({each.task for each in usable.train})
    packing = Packing(usable.train, row_length, 0, tasks)
    counts = Acceptance(len(tasks), trainee.num_steps, model.device)
    capture = Capture(model, config.features, draft_tokens)
    measure(trainee, tensors, capture, packing, packing.epoch(0), _ROWS, counts)
    found = counts.counts.cpu()
    about = usable.counts()
    return {
        "kind": config.kind,
        "samples": about["train"],
        "predicted": about["supervised_tokens"],
        "cut": about["cut"],
        "dropped": about["dropped"],
        **summary(found.sum(0)),
        "by_task": summaries(found, tasks),
    }


def table(result: dict[str, Any]) -> str:
    """What `evaluate` found as lines of text: the length, and acceptance by drafted position, of all and of each task."""
    rows = {"all": result, **result["by_task"]} if len(result["by_task"]) > 1 else {"all": result}
    width = max(8, *(len(name) for name in rows))
    positions = "".join(f"{k + 1:>7}" for k in range(len(result["acceptance"])))
    lines = [f"{'task':{width}}  length{positions}"]
    for name, each in rows.items():
        rates = "".join(f"{rate:7.3f}" for rate in each["acceptance"])
        lines.append(f"{name or '-':{width}}  {each['length']:6.3f}{rates}")
    return "\n".join(lines)
