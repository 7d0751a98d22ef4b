"""Which implementation of an operation runs: one table, filled per device, printable.

An op calls `implementation(name, tensor)`; it gets the kernel registered for the tensor's device, or the torch reference.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

from paceline.errors import ConfigError

Implementation = Callable[..., Any]

_REFERENCES = {
    "paged_attention": "paceline.ops.attention:reference",
    "linear": "paceline.ops.linear:linear_reference",
    "norm_linear": "paceline.ops.linear:norm_linear_reference",
    "linear_add": "paceline.ops.linear:linear_add_reference",
    "norm_gated": "paceline.ops.linear:norm_gated_reference",
    "rope_and_cache": "paceline.ops.rope:reference",
    "argmax": "paceline.ops.argmax:reference",
    "copy_draft": "paceline.ops.copy_draft:reference",
    "decode_layout": "paceline.ops.layout:reference",
    "accept": "paceline.ops.accept:accept_reference",
    "compact": "paceline.ops.accept:compact_reference",
}
_KERNELS: dict[str, dict[str, str]] = {
    "cuda": {
        "paged_attention": "paceline.ops.triton.attention:paged_attention",
        "norm_linear": "paceline.ops.triton.linear:norm_linear",
        "linear_add": "paceline.ops.triton.linear:linear_add",
        "norm_gated": "paceline.ops.triton.linear:norm_gated",
        "rope_and_cache": "paceline.ops.triton.rope:rope_and_cache",
        "argmax": "paceline.ops.triton.argmax:argmax",
        "copy_draft": "paceline.ops.triton.drafting:copy_draft",
        "decode_layout": "paceline.ops.triton.drafting:decode_layout",
        "accept": "paceline.ops.triton.drafting:accept",
        "compact": "paceline.ops.triton.drafting:compact",
    },
}
_loaded: dict[str, Implementation] = {}


def implementation(op: str, tensor: Tensor) -> Implementation:
    """The callable for `op` on `tensor`'s device. Raises ConfigError for an op that is not in the table."""
    return _load(chosen(op, tensor.device.type))


def chosen(op: str, device: str) -> str:
    """The `module:function` that serves `op` on a device type; the reference where no kernel is registered."""
    if op not in _REFERENCES:
        raise ConfigError(f"there is no operation {op!r}; known: {', '.join(sorted(_REFERENCES))}")
    return _KERNELS.get(device, {}).get(op, _REFERENCES[op])


def choices(device: str) -> dict[str, str]:
    """Every operation and what serves it on a device type."""
    return {op: chosen(op, device) for op in _REFERENCES}


def _load(target: str) -> Implementation:
    if target not in _loaded:
        module, name = target.split(":")
        _loaded[target] = getattr(importlib.import_module(module), name)
    return _loaded[target]
