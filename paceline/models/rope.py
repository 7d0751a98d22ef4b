"""The cosines and sines of rotary position embedding, with the stretches that long-context models declare."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from paceline.models.config import ModelConfig, RopeScaling


def rope_table(config: ModelConfig, num_positions: int) -> Tensor:
    """[num_positions, head_dim] float32: cosines of the first half's angles, then sines."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    attention = 1.0
    if config.rope_scaling is not None:
        frequencies, attention = _stretched(frequencies, config.rope_scaling, config)
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1) * attention


def _stretched(frequencies: Tensor, scaling: RopeScaling, config: ModelConfig) -> tuple[Tensor, float]:
    """Scaled frequencies, and the factor on cosines and sines."""
    if scaling.kind == "linear":
        return frequencies / scaling.factor, 1.0
    if scaling.kind == "divided":
        return frequencies / torch.tensor(scaling.divisors), 1.0
    if scaling.kind == "llama3":
        return _llama3(frequencies, scaling), 1.0
    return _yarn(frequencies, scaling, config)


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1's: long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    turns = scaling.original_max_positions * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def _yarn(frequencies: Tensor, scaling: RopeScaling, config: ModelConfig) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023): dimensions that turn often are kept, those that turn rarely interpolated."""
    dim = config.head_dim

    def dimension(turns: float) -> float:
        period = scaling.original_max_positions / (turns * 2 * math.pi)
        return dim * math.log(period) / (2 * math.log(config.rope_theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / ((high - low) or 0.001)
    interpolated = ramp.clamp(0, 1)
    mixed = frequencies * (1 - interpolated) + frequencies / scaling.factor * interpolated
    attention = scaling.attention_factor
    if attention is None:
        attention = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return mixed, attention
