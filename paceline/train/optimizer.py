"""The optimizers of a drafter's weights: Muon for matrices between hidden states, AdamW for the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from paceline.errors import ConfigError

OPTIMIZERS = {"muon": 4e-3, "adamw": 1e-3}  # and their usual learning rates


class Optimizer:
    """One step updates all weights. `state` holds what a later run needs to continue."""

    def __init__(self, kind: str, parameters: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """`kind` is "muon", or "adamw" for all weights; `state` is {} for a new run.

        Muon (Jordan et al. 2024) makes each update orthogonal; its updates are scaled to AdamW's usual size, so that both
        take the same learning rate (Liu et al. 2025, arXiv 2502.16982). Raises ConfigError for another kind's state.
        """
        hidden = [each for name, each in parameters.items() if kind == "muon" and _is_hidden(name, each)]
        others = [each for name, each in parameters.items() if kind != "muon" or not _is_hidden(name, each)]
        fused = others[0].device.type == "cuda"
        self._each: dict[str, torch.optim.Optimizer] = {
            "adamw": torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0, fused=fused)
        }
        if hidden:
            self._each["muon"] = torch.optim.Muon(hidden, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        if "param_groups" in state:  # as saved before there was a choice
            state = {"adamw": state}
        if state and state.keys() != self._each.keys():
            raise ConfigError(f"the state was saved with the optimizer {list(state)[-1]}, not {kind}; give that one")
        for name, values in state.items():
            self._each[name].load_state_dict(values)

    def step(self, rate: float) -> None:
        """Updates the weights by their gradients at a learning rate, then clears the gradients."""
        for each in self._each.values():
            for group in each.param_groups:
                group["lr"] = rate
            each.step()
            each.zero_grad()

    def state(self) -> dict[str, Any]:
        return {name: each.state_dict() for name, each in self._each.items()}


def _is_hidden(name: str, tensor: Tensor) -> bool:
    """Whether a weight is a matrix of the layers or of `fc`, not of the heads over the vocabulary."""
    return tensor.ndim == 2 and name.startswith(("layers.", "fc."))
