"""Settings are checked when they are made, and completed for the machine by `resolve`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from paceline import errors
from paceline.config import EngineConfig, Hardware, resolve
from paceline.errors import ConfigError, DeviceError, PacelineError
from paceline.ops import weight

CPU = Hardware(False, 4, 8 << 30)
GPU = Hardware(True, 16, 80 << 30)


def test_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="max_batch"):
        EngineConfig.from_dict({"max_batches": 3})


@pytest.mark.parametrize(
    "values",
    [
        {"max_batch": 0},
        {"dtype": "int4"},
        {"device": "tpu"},
        {"max_draft": 300},
        {"max_batch": "8"},
        {"max_batch": True},
    ],
)
def test_impossible_values_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        EngineConfig.from_dict(values)


def test_resolve_makes_every_choice_and_a_new_object() -> None:
    config = EngineConfig()
    done = resolve(config, CPU, 4096)
    assert (done.device, done.dtype, done.threads, done.max_context) == ("cpu", "bfloat16", 4, 4096)
    assert resolve(config, GPU, 100_000).device == "cuda" and config == EngineConfig()
    assert resolve(done, CPU, 4096) == done


def test_the_dtype_is_bfloat16_where_that_is_fast() -> None:
    slow = dataclasses.replace(CPU, bfloat16=False)
    assert resolve(EngineConfig(), slow, 4096).dtype == "float32"
    assert resolve(EngineConfig(dtype="bfloat16"), slow, 4096).dtype == "bfloat16"


def test_without_a_compiler_bfloat16_is_fast_only_by_onednn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    detected = Hardware.detect()
    assert detected.bfloat16 == (detected.cuda or weight.packs())


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(DeviceError, match="CUDA"):
        resolve(EngineConfig(device="cuda"), CPU, 4096)


def test_a_context_beyond_the_model_s_is_refused() -> None:
    with pytest.raises(ConfigError, match="4096"):
        resolve(EngineConfig(max_context=5000), CPU, 4096)


def test_there_are_at_most_forty_settings_each_with_its_help() -> None:
    settings = dataclasses.fields(EngineConfig)
    assert len(settings) <= 40 and all(setting.metadata["help"] for setting in settings)


def test_the_error_tree_is_what_it_exports() -> None:
    found = {
        name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, PacelineError)
    }
    assert found == set(errors.__all__)
