"""The default sampling parameters that a model ships with, from generation_config.json or from GGUF metadata."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from paceline.errors import RequestError
from paceline.types import Sampling

_log = logging.getLogger(__name__)
_FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_GGUF_NAMES = dict(zip(_FIELDS, ("temp", "top_k", "top_p", "min_p", "penalty_repeat"), strict=True))


def from_generation_config(values: Mapping[str, Any]) -> Sampling:
    """From the content of a generation_config.json, interpreted as in vLLM.

    Decoding samples if `do_sample` is true or, if that is absent, if a temperature or a filter is given; the temperature is
    then 1 by default. Otherwise, and without a file, decoding is greedy. An invalid value is ignored, with a warning.
    """
    given = _usable({name: values.get(name) for name in _FIELDS})
    if values.get("do_sample") is False:
        given = {name: value for name, value in given.items() if name == "repetition_penalty"}
    elif values.get("do_sample") or given.keys() - {"repetition_penalty"}:
        given.setdefault("temperature", 1.0)
    return Sampling(**given)


def from_gguf(metadata: Mapping[str, Any]) -> Sampling:
    """From a GGUF file's `general.sampling` values, by the same rules."""
    values = {name: metadata.get(f"general.sampling.{gguf_name}") for name, gguf_name in _GGUF_NAMES.items()}
    return from_generation_config(values)


def _usable(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that are given and valid."""
    given: dict[str, Any] = {}
    for name, value in values.items():
        if value is None:
            continue
        try:
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise RequestError(f"{name} must be a number")
            if name == "top_k" and isinstance(value, float) and not value.is_integer():
                raise RequestError("top_k must be a whole number")
            # top_k = -1 means none, as in other engines; GGUF stores float32, so digits beyond the sixth are noise
            number = round(value, 6) if name != "top_k" else 0 if value == -1 else int(value)
            Sampling(**{name: number})  # type: ignore[arg-type]
        except RequestError as error:
            _log.warning("the model's default sampling has %s = %r, which is ignored: %s", name, value, error)
            continue
        given[name] = number
    return given
