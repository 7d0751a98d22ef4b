"""Prompts to the model, reading its answer, and Morph's prompt form."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.errors import ConfigError, InputError
from paceline.tasks.merge import Merge, candidate_merge
from paceline.tasks.prompts import (
    DEFAULT_POLICY,
    POLICIES,
    answer_start,
    chat_messages,
    expected_answer,
    fence_for,
    merged_text,
    morph_form,
    parse_morph,
    policy_named,
    stop_strings,
    with_warnings,
)

CODE = "import os\n\n\ndef f():\n    return 1\n\n\ndef g():\n    return 1\n"
MERGED = CODE.replace("def g():\n    return 1", "def g():\n    return {'{code}': 2}")
UPDATE = "# ... existing code ...\ndef g():\n    return {'{code}': 2}\n"


@pytest.mark.parametrize("name", POLICIES)
def test_the_prompt_holds_what_the_policy_shows(name: str) -> None:
    chat = chat_messages(POLICIES[name], CODE, UPDATE, "Return two.", MERGED)
    text = chat[-1]["content"]
    assert [message["role"] for message in chat[-1:]] == ["user"]
    assert UPDATE.strip() in text and "Return two." in text
    assert (MERGED if POLICIES[name].reviews else CODE).strip() in text


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("code", [CODE, CODE.rstrip("\n"), CODE + "\n", CODE.replace("\n", "\r\n")])
def test_the_expected_answer_reads_back_as_the_merge(name: str, code: str) -> None:
    policy = POLICIES[name]
    merged = code.replace("def g():\n    return 1", "def g():\n    return 2").replace(
        "def g():\r\n    return 1", "def g():\r\n    return 2"
    )
    answer = expected_answer(policy, code, merged)
    for stop in stop_strings(policy):
        answer = answer.split(stop)[0]
    assert merged_text(policy, code, answer) == merged


def test_prose_around_a_fence_is_left_out() -> None:
    assert merged_text(POLICIES["plain"], CODE, f"Here it is:\n```python\n{MERGED}```\nDone.") == MERGED
    assert merged_text(POLICIES["plain"], CODE, MERGED) == MERGED
    assert merged_text(POLICIES["plain"], CODE, f"```\n{MERGED}") == MERGED


def test_a_file_with_fences_gets_a_longer_one() -> None:
    text = "Read:\n```\ncode\n```\n"
    fence = fence_for(text)
    assert fence == "````"
    assert chat_messages(POLICIES["opened"], text, "x", "", text)[-1]["content"].count("\n````\n") == 4
    assert answer_start(POLICIES["opened"], fence) == "````\n"
    assert merged_text(POLICIES["opened"], text, text + fence, fence) == text


def test_blocks_that_do_not_fit_leave_the_file() -> None:
    assert merged_text(POLICIES["block"], CODE, "not there\n=======\nnew\n>>>>>>> REPLACE\n") == CODE


def test_an_unknown_policy_names_the_nearest() -> None:
    assert policy_named(DEFAULT_POLICY).name == DEFAULT_POLICY
    with pytest.raises(ConfigError, match="'review'"):
        policy_named("reviews")


PLAIN = st.lists(st.sampled_from([*"ab<>/ \n", "<code>", "</code>", "</update>", "é"]), max_size=30).map("".join)


@given(PLAIN, PLAIN)
def test_morph_form_reads_back(code: str, update: str) -> None:
    instruction, same_code, same_update = parse_morph(morph_form("Do it.", code, update))
    assert instruction == "Do it."
    assert (same_code, same_update) == (code, update)


def test_morph_form_without_an_instruction() -> None:
    assert parse_morph("<code>a</code>\n<update>b</update>") == ("", "a", "b")


def test_tags_inside_the_code_stay() -> None:
    code = "page = '<update>x</update></code>'"
    assert parse_morph(morph_form("", code, "y = 1")) == ("", code, "y = 1")


@pytest.mark.parametrize("text", ["", "<code>a</code>", "<update>a</update>", "code"])
def test_what_is_not_morph_form(text: str) -> None:
    with pytest.raises(InputError):
        parse_morph(text)


def test_the_default_policy_decides_by_rule_and_the_others_do_not() -> None:
    assert POLICIES[DEFAULT_POLICY].rule and POLICIES[DEFAULT_POLICY].reviews
    assert [name for name, policy in POLICIES.items() if policy.rule] == [DEFAULT_POLICY]


SETTINGS = "# settings\nversion: 1\nport: 80\nname: one\nkey: two\n"
PORT = "# ... existing code ...\nversion: 1\nport: 8080\nname: one\n"


def test_the_prompt_shows_a_warning_with_the_deleted_lines_and_the_alternative() -> None:
    merge = candidate_merge(SETTINGS, PORT, "a.yaml")
    assert merge.warnings and merge.alternative is not None
    text = with_warnings("Change the port.", SETTINGS, merge)
    assert text.startswith("Change the port.\n") and merge.warnings[0] in text
    assert text.splitlines().count("port: 80") == 1, "the line that goes"
    assert "-key: two" in text.splitlines(), "what the other reading changes"
    chat = chat_messages(POLICIES["auto"], SETTINGS, PORT, text, merge.text)
    assert text in chat[-1]["content"]


def test_without_a_warning_the_prompt_shows_only_the_instruction() -> None:
    merge = candidate_merge(CODE, f"{UPDATE}# ... existing code ...\n")
    assert merge.text == MERGED and with_warnings("Do it.", CODE, merge) == "Do it."
    assert with_warnings("", CODE, Merge(MERGED, (True,) * 9)) == ""


def test_the_prompt_shows_a_warning_without_an_alternative_alone() -> None:
    text = with_warnings("", "a\n", Merge("a\n", (True,), ("one", "two", "three", "four")))
    assert text == "The tool was not sure: one; two; three."


def test_the_shown_warnings_do_not_grow_with_the_file() -> None:
    code = "".join(f"value_{number}\n" for number in range(500))
    merge = Merge("", (False,) * 500, ("warning",), Merge(code, (True,) * 500))
    assert len(with_warnings("", code, merge).splitlines()) < 100


@pytest.mark.parametrize(
    ("code", "output", "text"),
    [
        ("a\r\nb\r\nc\r\n", "a\nb\nd\n", "a\r\nb\r\nd\r\n"),
        ("a\r\nb\nc\n", "a\nb\nd", "a\r\nb\nd\n"),
        ("a\nb  \n\t\nc\n", "a\nb\n\nd\n", "a\nb  \n\t\nd\n"),
        ("\ufeffa\nb\n", "a\nc\n", "\ufeffa\nc\n"),
        ("\ufeffa\nb\n", "\ufeffa\nc\n", "\ufeffa\nc\n"),
        ("a\nb", "a\nc\n", "a\nc"),
        ("a\nb", "a\nb\nc\n", "a\nb\nc"),
        ("a\nb\n\n\n", "a\nc\n", "a\nc\n\n\n"),
        ("a\x0cb\nc\n", "a\x0cb\nd\n", "a\x0cb\nd\n"),
        ("a\u2028b\nc\n", "a\u2028b\nd", "a\u2028b\nd\n"),
        # a closing fence without an opening one
        ("a\nb\n", "a\nc\n```", "a\nc\n"),
        ("a\nb\n", "a\nc\n```\n", "a\nc\n"),
        ("a\nb\n", "a\nc\n````\n", "a\nc\n"),
        ("a\n```\nb\n", "a\n```\nc\n```\n", "a\n```\nc\n"),
        # the file's own fence
        ("a\n```\nb\n```\n", "a\n```\nc\n```\n", "a\n```\nc\n```\n"),
    ],
)
@pytest.mark.parametrize("name", ["auto", "review", "opened"])
def test_the_merged_text_keeps_the_files_bytes(name: str, code: str, output: str, text: str) -> None:
    fence = fence_for(code)
    assert merged_text(POLICIES[name], code, output, fence) == text
    assert merged_text(POLICIES[name], "", output, fence, code) == text, "the candidate's, where one is given"
