"""How a model's makers say that it is to be sampled: from generation_config.json, or from what a GGUF file carries."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from paceline.errors import RequestError
from paceline.types import Sampling

_log = logging.getLogger(__name__)
_FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_IN_GGUF = dict(zip(_FIELDS, ("temp", "top_k", "top_p", "min_p", "penalty_repeat"), strict=True))


def from_generation_config(values: Mapping[str, Any]) -> Sampling:
    """From the content of a generation_config.json, as vLLM takes it.

    Tokens are drawn where `do_sample` or, if that is not said, a value of a filter or the temperature says so; the
    temperature is then 1 where none is given. Otherwise, as without a file, decoding is greedy. A value that cannot be
    used is left out, with a warning.
    """
    given = _usable({name: values.get(name) for name in _FIELDS})
    if values.get("do_sample") is False:
        given = {name: value for name, value in given.items() if name == "repetition_penalty"}
    elif values.get("do_sample") or given.keys() - {"repetition_penalty"}:
        given.setdefault("temperature", 1.0)
    return Sampling(**given)


def from_gguf(metadata: Mapping[str, Any]) -> Sampling:
    """From a GGUF file's `general.sampling` values, by the same rule."""
    values = {name: metadata.get(f"general.sampling.{theirs}") for name, theirs in _IN_GGUF.items()}
    return from_generation_config(values)


def _usable(values: Mapping[str, Any]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for name, value in values.items():
        if value is None:
            continue
        try:
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise RequestError(f"{name} must be a number")
            if name == "top_k" and isinstance(value, float) and not value.is_integer():
                raise RequestError("top_k must be a whole number")
            # -1 is how others write that there is no top_k; GGUF's numbers have the digits of float32
            number = round(value, 6) if name != "top_k" else 0 if value == -1 else int(value)
            Sampling(**{name: number})  # type: ignore[arg-type]
        except RequestError as error:
            _log.warning("the model's own sampling has %s = %r, which is ignored: %s", name, value, error)
            continue
        given[name] = number
    return given
