"""Tiny models run on one thread: waiting for a second one takes longer than their operations."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
