"""Which implementation of an operation runs: one table, filled per device, printable.

An op calls `implementation(name, tensor)`; it gets the kernel registered for the tensor's device, or the torch reference.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from paceline.errors import ConfigError

Implementation = Callable[..., Any]

_REFERENCES = {
    "paged_attention": "paceline.ops.attention:reference",
    "norm": "paceline.ops.linear:rms_norm",
    "linear": "paceline.ops.linear:linear_reference",
    "norm_linear": "paceline.ops.linear:norm_linear_reference",
    "linear_add": "paceline.ops.linear:linear_add_reference",
    "norm_gated": "paceline.ops.linear:norm_gated_reference",
    "linear_gated": "paceline.ops.linear:linear_gated_reference",
    "add_norm": "paceline.ops.linear:add_norm_reference",
    "experts": "paceline.ops.experts:reference",
    "rope_and_cache": "paceline.ops.rope:reference",
    "argmax": "paceline.ops.argmax:reference",
    "choose": "paceline.ops.choose:reference",
    "draw": "paceline.ops.draw:reference",
    "copy_draft": "paceline.ops.copy_draft:reference",
    "decode_layout": "paceline.ops.layout:reference",
    "copy_observe": "paceline.ops.copy_draft:observe_reference",
    "verify": "paceline.ops.verify:reference",
    "move_rows": "paceline.ops.move:reference",
    "last_states": "paceline.ops.draft_states:last_reference",
    "keep_states": "paceline.ops.draft_states:keep_reference",
    "draft_input": "paceline.ops.draft_states:input_reference",
    "keep_layers": "paceline.ops.draft_states:layers_reference",
    "confidence": "paceline.ops.confidence:reference",
    "join_drafts": "paceline.ops.join_drafts:reference",
    "chain_layout": "paceline.ops.chain_layout:reference",
    "block_layout": "paceline.ops.chain_layout:block_reference",
    "beam_layout": "paceline.ops.beams:layout_reference",
    "extend_beams": "paceline.ops.beams:reference",
}
_KERNELS: dict[str, dict[str, str]] = {
    "cpu": {
        "paged_attention": "paceline.ops.native.attention:paged_attention",
        "rope_and_cache": "paceline.ops.native.attention:rope_and_cache",
        "linear": "paceline.ops.native.linear:linear",
        "norm_linear": "paceline.ops.native.linear:norm_linear",
        "linear_add": "paceline.ops.native.linear:linear_add",
        "norm_gated": "paceline.ops.native.linear:norm_gated",
        "linear_gated": "paceline.ops.native.linear:linear_gated",
        "argmax": "paceline.ops.native.linear:argmax",
    },
    "cuda": {
        "paged_attention": "paceline.ops.triton.attention:paged_attention",
        "norm": "paceline.ops.triton.norm:norm",
        "linear": "paceline.ops.triton.linear:linear",
        "norm_linear": "paceline.ops.triton.linear:norm_linear",
        "linear_add": "paceline.ops.triton.linear:linear_add",
        "norm_gated": "paceline.ops.triton.linear:norm_gated",
        "linear_gated": "paceline.ops.triton.linear:linear_gated",
        "add_norm": "paceline.ops.triton.norm:add_norm",
        "experts": "paceline.ops.experts:on_cuda",
        "rope_and_cache": "paceline.ops.triton.rope:rope_and_cache",
        "argmax": "paceline.ops.triton.argmax:argmax",
        "choose": "paceline.ops.triton.choose:choose",
        "draw": "paceline.ops.triton.draw:draw",
        "copy_draft": "paceline.ops.triton.copy_draft:copy_draft",
        "decode_layout": "paceline.ops.triton.layout:decode_layout",
        "copy_observe": "paceline.ops.triton.copy_draft:copy_observe",
        "verify": "paceline.ops.triton.verify:verify",
        "move_rows": "paceline.ops.triton.move:move_rows",
        "last_states": "paceline.ops.triton.draft_states:last_states",
        "keep_states": "paceline.ops.triton.draft_states:keep_states",
        "draft_input": "paceline.ops.triton.draft_states:draft_input",
        "keep_layers": "paceline.ops.triton.draft_states:keep_layers",
        "confidence": "paceline.ops.triton.confidence:confidence",
        "join_drafts": "paceline.ops.triton.join_drafts:join_drafts",
        "chain_layout": "paceline.ops.triton.chain_layout:chain_layout",
        "block_layout": "paceline.ops.triton.chain_layout:block_layout",
        "beam_layout": "paceline.ops.triton.beams:beam_layout",
        "extend_beams": "paceline.ops.triton.beams:extend_beams",
    },
}
# implementations for deterministic mode, where a row's bits must not depend on the other rows of the call; all other
# implementations have that property already
_DETERMINISTIC: dict[str, dict[str, str]] = {
    "cpu": {
        "paged_attention": "paceline.ops.native.attention:paged_attention_deterministic",
        "linear": "paceline.ops.native.linear:linear_deterministic",
    },
    "cuda": {
        "paged_attention": "paceline.ops.triton.attention:paged_attention_deterministic",
        "norm": "paceline.ops.triton.norm:norm_deterministic",
        "linear": "paceline.ops.triton.linear:linear_deterministic",
        "norm_linear": "paceline.ops.triton.linear:norm_linear_deterministic",
        "linear_add": "paceline.ops.triton.linear:linear_add_deterministic",
        "norm_gated": "paceline.ops.triton.linear:norm_gated_deterministic",
        "linear_gated": "paceline.ops.triton.linear:linear_gated_deterministic",
        "experts": "paceline.ops.experts:on_cuda_deterministic",
        "choose": "paceline.ops.triton.choose:choose_deterministic",
    },
}
_loaded: dict[str, Implementation] = {}
_deterministic: ContextVar[bool] = ContextVar("deterministic", default=False)
_differentiable: ContextVar[bool] = ContextVar("differentiable", default=False)


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Within it, ops of this thread run batch-invariant implementations if `wanted`."""
    token = _deterministic.set(wanted)
    try:
        yield
    finally:
        _deterministic.reset(token)


@contextmanager
def differentiable() -> Iterator[None]:
    """Within it, ops of this thread run their references, which autograd can differentiate: for training."""
    token = _differentiable.set(True)
    try:
        yield
    finally:
        _differentiable.reset(token)


def implementation(op: str, tensor: Tensor) -> Implementation:
    """The callable for `op` on `tensor`'s device. Raises ConfigError for an op that is not in the table."""
    if _differentiable.get():
        return _load(_REFERENCES[op])
    return _load(chosen(op, tensor.device.type, _deterministic.get()))


def chosen(op: str, device: str, deterministic: bool = False) -> str:
    """The `module:function` that serves `op` on a device type; the reference where no kernel is registered."""
    if op not in _REFERENCES:
        raise ConfigError(f"there is no operation {op!r}; known: {', '.join(sorted(_REFERENCES))}")
    usual = _KERNELS.get(device, {}).get(op, _REFERENCES[op])
    return _DETERMINISTIC.get(device, {}).get(op, usual) if deterministic else usual


def choices(device: str, deterministic: bool = False) -> dict[str, str]:
    """Every operation and what serves it on a device type."""
    return {op: chosen(op, device, deterministic) for op in _REFERENCES}


def _load(target: str) -> Implementation:
    if target not in _loaded:
        module, name = target.split(":")
        _loaded[target] = getattr(importlib.import_module(module), name)
    return _loaded[target]
