"""Triton kernels of the ops. Import a module only where Triton is installed; `paceline.ops.dispatch` does so on CUDA.

Kernels follow each other by programmatic dependent launch where the GPU has it (Hopper and later): a kernel may start
while the one before it still runs, reads nothing but parameters until `after_previous`, and so hides its launch and
the first reads of its weights. Every kernel waits before its first store, which keeps the order transitive.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

__all__ = ["launch_options", "overlaps"]


@functools.cache
def overlaps(device: torch.device) -> bool:
    """Whether kernels on `device` may start before their predecessor ends."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def launch_options(device: torch.device) -> dict[str, Any]:
    """The keyword arguments of every launch: the kernels' OVERLAP flag and the launch attribute that goes with it."""
    return {"OVERLAP": True, "launch_pdl": True} if overlaps(device) else {"OVERLAP": False}
