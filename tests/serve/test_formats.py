"""Tool calls of every format: parsing gives the same events for any split of the stream, and loses no call."""

from __future__ import annotations

import random
import time

import pytest

from paceline.serve.service import merge_adjacent
from paceline.serve.tools import Call, Event, Parser, Text
from tests.serve.formats import FORMATS, parser_of, samples

NUM_RANDOM_SPLITS = 200


def parsed(parser: Parser, *pieces: str) -> list[Event]:
    events: list[Event] = []
    for piece in pieces:
        events += parser.feed(piece)
    return merge_adjacent(events + parser.finish())


def test_the_corpus_is_large() -> None:
    assert sum(1 for name in FORMATS for _ in samples(name)) >= 300


@pytest.mark.parametrize("name", FORMATS)
def test_any_split_gives_what_the_whole_gives(name: str) -> None:
    draw = random.Random(name)
    for sample in samples(name):
        text = sample.text
        whole = parsed(parser_of(name, sample.has_reasoning), text)
        for place in range(len(text) + 1):
            assert parsed(parser_of(name, sample.has_reasoning), text[:place], text[place:]) == whole, (place, text)
        for _ in range(NUM_RANDOM_SPLITS):
            cuts = sorted(draw.randrange(len(text) + 1) for _ in range(draw.randrange(2, 9)))
            pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
            assert parsed(parser_of(name, sample.has_reasoning), *pieces) == whole, pieces
        assert parsed(parser_of(name, sample.has_reasoning), *text) == whole, text


@pytest.mark.parametrize("name", FORMATS)
def test_calls_come_out_as_they_were_written(name: str) -> None:
    for sample in samples(name):
        events = parsed(parser_of(name, sample.has_reasoning), sample.text)
        if sample.events is not None:
            assert events == sample.events, sample.text
        if sample.cut:
            assert events == [Text(sample.text)]


@pytest.mark.parametrize("name", FORMATS)
def test_a_call_cut_anywhere_is_text_and_whole_ones_before_it_are_calls(name: str) -> None:
    arguments = {"path": "a.py", "content": "x = 1\n"}
    text = FORMATS[name].write([("write", arguments), ("write", arguments)])
    whole = parsed(parser_of(name), text)
    assert len(whole) == 2
    for end in range(len(text)):
        events = parsed(parser_of(name), text[:end])
        calls = [each for each in events if isinstance(each, Call)]
        assert calls == whole[: len(calls)] and events[: len(calls)] == calls
        rest = events[len(calls) :]
        if calls:
            assert all(isinstance(each, Text) and text[:end].endswith(each.text) for each in rest)
        else:
            assert rest == ([Text(text[:end])] if end else [])


def seconds(name: str, size: int) -> float:
    text = FORMATS[name].write([("write", {"content": "x = '<tool_call>' </parameter>\n" * (size // 31)})])
    parser = parser_of(name)
    begin = time.process_time()
    events = parsed(parser, *(text[place : place + 3] for place in range(0, len(text), 3)))
    spent = time.process_time() - begin
    assert len(events) == 1 and isinstance(events[0], Call)
    return spent


@pytest.mark.parametrize("name", FORMATS)
def test_time_is_linear_in_a_long_argument(name: str) -> None:
    small, large = min(seconds(name, 25_000) for _ in range(2)), min(seconds(name, 200_000) for _ in range(2))
    assert large < 20 * small  # eight times the text; quadratic time would be 64 times as long


def test_white_space_without_end_takes_linear_time() -> None:
    begin = time.process_time()
    for name in FORMATS:
        assert parsed(parser_of(name), *["   "] * 60_000) == [Text(" " * 180_000)]
    assert time.process_time() - begin < 10


def test_a_parameter_without_schema_is_text() -> None:
    text = "<tool_call>\n<function=other>\n<parameter=limit>\n3\n</parameter>\n</function>\n</tool_call>"
    assert parsed(parser_of("qwen_coder"), text) == [Call("other", '{"limit": "3"}')]


def test_words_of_python_that_templates_write_are_values() -> None:
    text = (
        "<tool_call>\n<function=write>\n<parameter=force>\nTrue\n</parameter>\n<parameter=note>\nNone\n</parameter>\n"
        "<parameter=content>\nNone\n</parameter>\n</function>\n</tool_call>"
    )
    assert parsed(parser_of("qwen_coder"), text) == [Call("write", '{"force": true, "note": null, "content": "None"}')]


def test_a_value_ends_only_where_the_format_goes_on() -> None:
    value = "</parameter></parameter>\n</function>\n</parameter>\n<parameter=>\n</tool_call>"
    text = f"<tool_call>\n<function=write>\n<parameter=content>\n{value}\n</parameter>\n</function>\n</tool_call>"
    (call,) = parsed(parser_of("qwen_coder"), text)
    assert call == Call("write", '{"content": ' + repr(value).replace("'", '"') + "}")


def test_several_functions_in_one_section_are_several_calls() -> None:
    function = "<function=write>\n<parameter=limit>\n1\n</parameter>\n</function>\n"
    events = parsed(parser_of("qwen_coder"), f"<tool_call>\n{function * 3}</tool_call>")
    assert events == [Call("write", '{"limit": 1}')] * 3
    events = parsed(parser_of("qwen_coder"), f"<tool_call>\n{function}<function=write>\nno")
    assert events == [Call("write", '{"limit": 1}'), Text("<function=write>\nno")]


@pytest.mark.parametrize("ending", ["", "\n</tool_call>", "\n</tool_call>\n", "\n"])
def test_a_tool_called_without_its_opening_marker_is_a_call(ending: str) -> None:
    value = "x </parameter> <function=f> </function>"
    bare = f"<function=write>\n<parameter=content>\n{value}\n</parameter>\n</function>"
    text = f"I write <function=other>.\n\n{bare}\n</tool_call>\n{bare}{ending}"
    call = Call("write", '{"content": "' + value + '"}')
    for place in range(len(text) + 1):
        events = parsed(parser_of("qwen_coder"), text[:place], text[place:])
        assert events == [Text("I write <function=other>."), call, call]
    events = parsed(parser_of("qwen_coder"), f"{bare} and on")
    assert events == [call, Text("and on")]
    cut = bare.removesuffix("</function>")
    assert parsed(parser_of("qwen_coder"), cut) == [Text(cut)]


def test_dsml_says_itself_whether_a_value_is_text() -> None:
    text = FORMATS["dsml"].write([("write", {"limit": "3", "content": 3, "path": [1], "note": "null"})])
    assert parsed(parser_of("dsml"), text) == [
        Call("write", '{"limit": "3", "content": 3, "path": [1], "note": "null"}')
    ]
    assert parsed(parser_of("dsml"), text.replace("[1]", "[1")) == [
        Call("write", '{"limit": "3", "content": 3, "path": "[1", "note": "null"}')
    ]
