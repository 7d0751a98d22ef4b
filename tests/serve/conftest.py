"""Fixtures: a server over a tiny random model, and OpenAI's client for it."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.serve.service import running, tiny_service


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with running(tiny_service()) as url:
        yield url


@pytest.fixture
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as made:
        yield made
