"""Checks of OpenAI's and Anthropic's SDKs for Python. Runs in their environment, not in Paceline's.

python python_sdks.py SCRIPTED_URL TINY_URL    # prints "ok NAME" or "failed NAME: reason" for each check
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import anthropic
import openai

SCRIPTED, TINY = sys.argv[1:3]
PATH = "/project/a.py"
TASK = f"EDIT {PATH}: replace one by two"
HELLO: list[Any] = [{"role": "user", "content": "Hello there"}]
SCHEMA: dict[str, Any] = {"type": "object", "properties": {"filePath": {"type": "string"}}}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": name, "description": name, "parameters": SCHEMA}}
    for name in ("read", "edit")
]
CHECKS: list[Callable[[], None]] = []
# strict: a reply that does not match the SDK's types raises
OPTIONS: dict[str, Any] = {"api_key": "none", "max_retries": 0, "_strict_response_validation": True}
scripted, tiny = (openai.OpenAI(base_url=f"{url}/v1", **OPTIONS) for url in (SCRIPTED, TINY))
messages, tiny_messages = (anthropic.Anthropic(base_url=url, **OPTIONS) for url in (SCRIPTED, TINY))


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS.append(function)
    return function


@check
def openai_chat() -> None:
    whole = tiny.chat.completions.create(model="tiny", messages=HELLO, max_completion_tokens=30)
    chunks = list(
        tiny.chat.completions.create(
            model="tiny", messages=HELLO, max_completion_tokens=30, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(each.choices[0].delta.content or "" for each in chunks if each.choices)
    assert text and text == whole.choices[0].message.content, "streamed and whole replies differ"
    assert whole.usage is not None and chunks[-1].usage is not None
    assert whole.usage.completion_tokens == chunks[-1].usage.completion_tokens == 30


@check
def openai_tools() -> None:
    history: list[Any] = [{"role": "user", "content": TASK}]
    for name in ("read", "edit"):
        with scripted.chat.completions.stream(model="tiny", messages=history, tools=TOOLS) as stream:
            streamed = stream.get_final_completion().choices[0]
        whole = scripted.chat.completions.create(model="tiny", messages=history, tools=TOOLS).choices[0]
        assert streamed.finish_reason == whole.finish_reason == "tool_calls"
        calls: list[Any] = whole.message.tool_calls or []
        assert [each.function.name for each in calls] == [name], calls
        assert json.loads(calls[0].function.arguments)["filePath"] == PATH
        more: Any = streamed.message.tool_calls
        assert [each.function.arguments for each in more] == [each.function.arguments for each in calls]
        history.append(whole.message.model_dump(exclude_none=True))
        history.append({"role": "tool", "tool_call_id": calls[0].id, "content": "ok"})
    last = scripted.chat.completions.create(model="tiny", messages=history, tools=TOOLS).choices[0]
    assert last.finish_reason == "stop" and last.message.content == "Done: one is now two."


@check
def openai_prediction() -> None:
    words = tiny.chat.completions.create(model="tiny", messages=HELLO, max_tokens=300).choices[0].message.content
    assert words
    helped = tiny.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=300, prediction={"type": "content", "content": words}
    )
    assert helped.choices[0].message.content == words
    assert helped.usage is not None and helped.usage.completion_tokens_details is not None
    assert (helped.usage.completion_tokens_details.accepted_prediction_tokens or 0) > 0


@check
def openai_completions_and_models() -> None:
    assert "tiny" in [each.id for each in tiny.models.list()]
    reply = tiny.completions.create(model="tiny", prompt="def add(", suffix="return x", max_tokens=8)
    assert reply.usage is not None and reply.usage.completion_tokens <= 8
    try:
        tiny.chat.completions.create(model="no-such-model", messages=HELLO)
    except openai.NotFoundError as error:
        assert error.code == "model_not_found"
    else:
        raise AssertionError("an unknown model was answered")


@check
def openai_responses() -> None:
    tools: list[Any] = [{**each["function"], "type": "function", "strict": False} for each in TOOLS]
    history: list[Any] = [{"role": "user", "content": TASK}]
    for name in ("read", "edit"):
        reply = scripted.responses.create(model="tiny", input=history, tools=tools, store=False)
        with scripted.responses.stream(model="tiny", input=history, tools=tools, store=False) as stream:
            streamed = stream.get_final_response()
        calls = [each for each in reply.output if each.type == "function_call"]
        more = [each for each in streamed.output if each.type == "function_call"]
        assert [each.name for each in calls] == [each.name for each in more] == [name], reply.output
        assert calls[0].arguments == more[0].arguments and json.loads(calls[0].arguments)["filePath"] == PATH
        history += [each.model_dump(exclude_none=True) for each in reply.output]
        history.append({"type": "function_call_output", "call_id": calls[0].call_id, "output": "ok"})
    last = scripted.responses.create(model="tiny", input=history, tools=tools, store=False)
    assert last.status == "completed" and last.output_text == "Done: one is now two."
    assert last.usage is not None and last.usage.output_tokens > 0


@check
def anthropic_messages() -> None:
    options: Any = {"model": "tiny", "messages": HELLO, "max_tokens": 30, "system": "Be brief."}
    whole = tiny_messages.messages.create(**options)
    with tiny_messages.messages.stream(**options) as stream:
        streamed = stream.get_final_message()
    assert whole.content and [each.to_dict() for each in whole.content] == [each.to_dict() for each in streamed.content]
    count = tiny_messages.messages.count_tokens(model="tiny", messages=HELLO, system="Be brief.").input_tokens
    for each in (whole, streamed):
        assert each.usage.input_tokens + (each.usage.cache_read_input_tokens or 0) == count
        assert each.usage.output_tokens == 30 and each.stop_reason == "max_tokens"


@check
def anthropic_tools() -> None:
    tools: list[Any] = [{"name": name, "description": name, "input_schema": SCHEMA} for name in ("read", "edit")]
    history: list[Any] = [{"role": "user", "content": TASK}]
    for name in ("read", "edit"):
        options: Any = {"model": "tiny", "messages": history, "max_tokens": 500, "tools": tools}
        whole = messages.messages.create(**options)
        with messages.messages.stream(**options) as stream:
            streamed = stream.get_final_message()
        calls = [[part for part in each.content if part.type == "tool_use"] for each in (whole, streamed)]
        assert whole.stop_reason == streamed.stop_reason == "tool_use"
        assert [[each.name for each in part] for part in calls] == [[name], [name]]
        assert calls[0][0].input == calls[1][0].input and calls[0][0].input["filePath"] == PATH  # type: ignore[index]
        history.append({"role": "assistant", "content": [each.to_dict() for each in whole.content]})
        result = {"type": "tool_result", "tool_use_id": calls[0][0].id, "content": "ok"}
        history.append({"role": "user", "content": [result]})
    last: Any = messages.messages.create(model="tiny", messages=history, max_tokens=500, tools=tools)
    assert last.stop_reason == "end_turn" and last.content[0].text == "Done: one is now two."


def main() -> None:
    for function in CHECKS:
        try:
            function()
        except Exception as error:  # any exception of a client is the check's result
            print(f"failed {function.__name__}: {type(error).__name__}: {error}".replace("\n", " "), flush=True)
        else:
            print(f"ok {function.__name__}", flush=True)


main()
