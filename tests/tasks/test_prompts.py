"""How the model is asked and its answer read, and Morph's form."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.errors import ConfigError, InputError
from paceline.tasks.prompts import (
    DEFAULT_POLICY,
    POLICIES,
    expected,
    fence_for,
    messages,
    morph_form,
    opening,
    parse_morph,
    policy_named,
    read,
    stops,
)

CODE = "import os\n\n\ndef f():\n    return 1\n\n\ndef g():\n    return 1\n"
MERGED = CODE.replace("def g():\n    return 1", "def g():\n    return {'{code}': 2}")
UPDATE = "# ... existing code ...\ndef g():\n    return {'{code}': 2}\n"


@pytest.mark.parametrize("name", POLICIES)
def test_the_prompt_holds_what_the_policy_shows(name: str) -> None:
    chat = messages(POLICIES[name], CODE, UPDATE, "Return two.", MERGED)
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
    answer = expected(policy, code, merged)
    for stop in stops(policy):
        answer = answer.split(stop)[0]
    assert read(policy, code, answer) == merged


def test_prose_around_a_fence_is_left_out() -> None:
    assert read(POLICIES["plain"], CODE, f"Here it is:\n```python\n{MERGED}```\nDone.") == MERGED
    assert read(POLICIES["plain"], CODE, MERGED) == MERGED
    assert read(POLICIES["plain"], CODE, f"```\n{MERGED}") == MERGED


def test_a_file_with_fences_gets_a_longer_one() -> None:
    text = "Read:\n```\ncode\n```\n"
    fence = fence_for(text)
    assert fence == "````"
    assert messages(POLICIES["opened"], text, "x", "", text)[-1]["content"].count("\n````\n") == 4
    assert opening(POLICIES["opened"], fence) == "````\n"
    assert read(POLICIES["opened"], text, text + fence, fence) == text


def test_blocks_that_do_not_fit_leave_the_file() -> None:
    assert read(POLICIES["block"], CODE, "not there\n=======\nnew\n>>>>>>> REPLACE\n") == CODE


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
