"""LangChain's standard integration tests of its chat models on a server. They run in their own environment:

    python -m venv lc && lc/bin/pip install langchain-tests==1.1.9 langchain-openai==1.7.4 langchain-anthropic==1.7.10
    paceline serve qwen2.5-coder-1.5b --max-context 8192 --alias other-name
    URL=http://127.0.0.1:8000 MODEL=qwen2.5-coder-1.5b lc/bin/pytest -o asyncio_mode=auto \\
        -o asyncio_default_fixture_loop_scope=session -o asyncio_default_test_loop_scope=session --timeout 90 \\
        tests/clients/langchain_standard.py

Images, audio and files are not declared, so their tests are skipped. All tests share one event loop, as LangChain reuses its
asynchronous client across tests.
"""

from __future__ import annotations

import os
from typing import Any

from langchain_anthropic import ChatAnthropic
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests

URL, MODEL = os.environ["URL"], os.environ["MODEL"]


class _Standard(ChatModelIntegrationTests):
    """The features that the server supports, as the standard tests declare them."""

    has_tool_choice = True
    has_structured_output = True
    returns_usage_metadata = True
    supports_model_override = True
    model_override_value = "other-name"


class TestChat(_Standard):
    chat_model_class = ChatOpenAI
    supports_json_mode = True

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": MODEL, "base_url": f"{URL}/v1", "api_key": "none", "stream_usage": True}


class TestMessages(_Standard):
    chat_model_class = ChatAnthropic

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": MODEL, "base_url": URL, "api_key": "none"}
