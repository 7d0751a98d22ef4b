"""`paceline serve` refuses unsupported options in one line, before it loads a model."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from paceline.errors import ConfigError
from paceline.serve.run import keys_of

WITHOUT_STARLETTE = "import sys; sys.modules['starlette'] = None; from paceline.cli import main; main()"


def paceline(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=60, env=variables, check=False
    )


def test_an_open_address_without_a_key_is_refused() -> None:
    done = paceline("-m", "paceline", "serve", "no-such-model", "--host", "0.0.0.0")
    assert done.returncode == 1 and "--allow-open" in done.stderr and "Traceback" not in done.stderr


def test_a_missing_extra_is_named() -> None:
    done = paceline("-c", WITHOUT_STARLETTE, "serve", "no-such-model")
    assert done.returncode == 1 and "paceline[serve]" in done.stderr and "Traceback" not in done.stderr


def test_keys_come_from_the_option_and_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACELINE_API_KEY", "from-environment")
    assert keys_of(["given"]) == ["given", "from-environment"]
    monkeypatch.delenv("PACELINE_API_KEY")
    assert keys_of([]) == []
    with pytest.raises(ConfigError):
        keys_of([""])
