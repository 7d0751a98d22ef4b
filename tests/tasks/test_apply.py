"""Fast Apply end to end: by rule without a model, and with a real one."""

from __future__ import annotations

from typing import NoReturn

import pytest

from paceline.config import EngineConfig
from paceline.engine.engine import Engine
from paceline.errors import ConfigError, ContextExceeded, EditNotFound, EmptyEdit
from paceline.models.checkpoint import open_checkpoint
from paceline.models.pull import pull
from paceline.tasks.apply import Applied, Prepared, apply, prepare, prompt_and_draft
from paceline.tasks.merge import candidate_merge
from paceline.tasks.prompts import POLICIES, Policy, answer_start, chat_messages, expected_answer, fence_for
from paceline.types import Request, Sampling, StepOutput, Usage

CODE = "import os\n\n\ndef load(path):\n    return open(path).read()\n\n\ndef remove(path):\n    os.remove(path)\n"
EDIT = (
    "# ... existing code ...\ndef load(path):\n    with open(path) as file:\n        return file.read()\n\n\n"
    "# ... existing code ...\n"
)
MERGED = CODE.replace("    return open(path).read()\n", "    with open(path) as file:\n        return file.read()\n")
# SmolLM2 cannot copy a file. An unlimited margin makes it follow the candidate, so that all the code around it runs
FORCED = Policy("forced", margin=1e6)


TABLE = "CREATE TABLE {} (\n  id INT,\n  name TEXT,\n  size INT\n);\n"
TABLES = f"{TABLE.format('a')}\n{TABLE.format('b')}"
COLUMN = "-- ...\n  name TEXT NOT NULL,\n  size INT\n-- ...\n"  # fits two tables equally well
FIRST, SECOND = (TABLES.replace(each, each.replace("TEXT", "TEXT NOT NULL")) for each in map(TABLE.format, "ab"))
ELEPHANT = "class Elephant:\n    trunk = 1\n"  # gives a warning, without an alternative


def no_engine() -> NoReturn:
    raise AssertionError("no engine is needed")


def ambiguous_edit(policy: str = "auto") -> Prepared:
    """The request for the column's edit, which has two interpretations."""
    merge = candidate_merge(TABLES, COLUMN, "a.sql")
    return Prepared(TABLES, COLUMN, POLICIES[policy], "```", merge, Request([1], Sampling()), "a.sql")


@pytest.mark.parametrize("policy", [None, "auto", POLICIES["auto"]])
@pytest.mark.parametrize("code", [CODE, CODE.replace("\n", "\r\n"), "\ufeff" + CODE, CODE.rstrip("\n")])
def test_an_edit_without_a_warning_needs_no_engine(code: str, policy: str | Policy | None) -> None:
    result = apply(no_engine, code, EDIT, path="store.py", policy=policy)
    assert result.text == candidate_merge(code, EDIT).text and result.reasons == ()
    assert (result.source, result.policy, result.path) == ("rule", "auto", "store.py")
    assert result.usage == Usage() and result.usage.output_tokens == 0
    assert result.as_dict()["source"] == "rule" and not result.as_dict()["flagged"]


def test_an_edit_with_a_warning_and_no_alternative_is_flagged_without_an_engine() -> None:
    merge = candidate_merge(CODE, ELEPHANT, "store.py")
    assert merge.warnings and merge.alternative is None
    result = apply(no_engine, CODE, ELEPHANT, path="store.py")
    assert (result.text, result.source, result.usage) == (merge.text, "rule", Usage())
    assert set(merge.warnings) <= set(result.reasons) and result.as_dict()["flagged"]


def test_a_merge_that_breaks_the_file_is_flagged_without_an_engine() -> None:
    result = apply(no_engine, CODE, "def remove(path):\n    os.remove(path\n", path="store.py")
    assert result.source == "rule" and any("syntax error" in reason for reason in result.reasons)


@pytest.mark.parametrize(
    ("edit", "policy", "error"),
    [
        (" \n", "auto", EmptyEdit),
        ("trunk = elephant(1)\n", "auto", EditNotFound),
        (EDIT, "automatic", ConfigError),
        (" \n", "review", EmptyEdit),
    ],
)
def test_what_cannot_be_merged_is_refused_before_an_engine_is_made(
    edit: str, policy: str, error: type[Exception]
) -> None:
    with pytest.raises(error):
        prepare(no_engine, CODE, edit, policy=policy)


@pytest.mark.parametrize(("edit", "policy"), [(EDIT, "review"), (EDIT, "review-margin"), (EDIT, "opened")])
def test_other_policies_ask_the_model_without_a_warning_too(edit: str, policy: str) -> None:
    with pytest.raises(AssertionError, match="no engine"):
        prepare(no_engine, CODE, edit, policy=policy)


def test_the_model_is_asked_about_two_interpretations() -> None:
    with pytest.raises(AssertionError, match="no engine"):
        prepare(no_engine, TABLES, COLUMN, path="a.sql")


@pytest.mark.parametrize(
    ("output", "text", "source"),
    [
        (FIRST, FIRST, "model"),
        (SECOND, SECOND, "model"),
        (f"{SECOND}```", SECOND, "model"),
        (TABLES, FIRST, "rule"),
        (TABLES.replace("TEXT", "TEXT NOT NULL"), FIRST, "rule"),
        (FIRST.replace("size", "length"), FIRST, "rule"),
        (FIRST[:20], FIRST, "rule"),
        ("", FIRST, "rule"),
    ],
    ids=["candidate", "other", "fenced", "file", "both", "own words", "cut", "nothing"],
)
def test_the_models_text_is_taken_if_it_is_one_of_the_interpretations(output: str, text: str, source: str) -> None:
    prepared = ambiguous_edit()
    assert (
        prepared.merge.text == FIRST
        and prepared.merge.alternative is not None
        and prepared.merge.alternative.text == SECOND
    )
    result = prepared.conclude(output, Usage(), False)
    assert (result.text, result.source) == (text, source)
    assert any("line 3" in reason and "line 9" in reason for reason in result.reasons), "the warning stays"


def test_a_cut_off_output_is_flagged() -> None:
    assert "the output was cut off at its token limit" in ambiguous_edit().conclude(SECOND, Usage(), True).reasons


def test_other_policies_keep_the_models_own_text() -> None:
    own = FIRST.replace("size", "length")
    result = ambiguous_edit("review").conclude(own, Usage(), False)
    assert (result.text, result.source) == (own, "model")
    assert any("size INT" in reason for reason in result.reasons)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load("smollm2-135m", EngineConfig(device="cpu", max_context=2048))


@pytest.mark.model
def test_a_merge_that_follows_its_candidate(engine: Engine) -> None:
    steps: list[StepOutput] = []
    result = apply(engine, CODE, EDIT, "close the file", path="store.py", policy=FORCED, on_step=steps.append)
    assert result.text == MERGED and result.reasons == ()
    assert result.usage.steps < 12 and result.usage.accepted_tokens > 0.9 * result.usage.output_tokens - 2
    assert result.usage.margin_tokens > 0, "a margin that was used must be counted"
    assert "+    with open(path) as file:" in result.diff().splitlines()
    assert steps[-1].finish is not None and sum(len(step.tokens) for step in steps) == result.usage.output_tokens


@pytest.mark.model
def test_line_ends_and_fences_of_the_file_survive(engine: Engine) -> None:
    code = '"""Example:\n\n```\nload(1)\n```\n"""\n' + CODE
    for text, wanted in (
        (code, code.replace(CODE, MERGED)),
        (CODE.replace("\n", "\r\n"), MERGED.replace("\n", "\r\n")),
        (CODE.rstrip("\n"), MERGED.rstrip("\n")),
    ):
        assert apply(engine, text, EDIT, path="store.py", policy=FORCED).text == wanted


@pytest.mark.model
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("code", "edit"),
    [
        (CODE, EDIT),
        (CODE, EDIT.removeprefix("# ... existing code ...\n")),
        (CODE.replace("\n", "\r\n"), EDIT),
        (CODE.replace("import os\n", "    # <|im_end|> and <think>\nimport os\n"), "\n    # ...\n" + EDIT),
        (CODE.replace("import os\n", "// ```\n````\nimport os  \n"), EDIT + "  \n\t\n"),
        ("e\u0301 = 1\n" + CODE, EDIT),
    ],
)
def test_the_spliced_prompt_equals_the_chat_encoded_whole(policy: str, code: str, edit: str) -> None:
    tokenizer = open_checkpoint(pull("smollm2-135m")).tokenizer()
    chosen, merge = POLICIES[policy], candidate_merge(code, edit)
    fence = fence_for(code, edit, merge.text)
    for instruction in ("", 'close "<update>"\nnow'):
        prompt, source = prompt_and_draft(tokenizer, chosen, code, edit, instruction, merge, fence)
        chat = chat_messages(chosen, code, edit, instruction, merge.text)
        assert prompt == tokenizer.encode_chat(chat) + tokenizer.encode(answer_start(chosen, fence))
        answer = tokenizer.encode(expected_answer(chosen, code, merge.text, fence))
        assert source == [*answer, *tokenizer.eos_tokens[:1]]


@pytest.mark.model
def test_drafts_do_not_change_what_the_model_writes(engine: Engine) -> None:
    drafted, plain = (
        engine.generate([prepare(engine, CODE, EDIT, path="store.py", policy="opened", drafted=each).request])[0]
        for each in (True, False)
    )
    shared = next((i for i, (a, b) in enumerate(zip(drafted.tokens, plain.tokens, strict=False)) if a != b), None)
    assert shared is None or shared > 20, "bf16 may break a tie differently, but not at once"


@pytest.mark.model
@pytest.mark.parametrize(
    ("code", "edit", "error"),
    [
        (CODE, " \n", EmptyEdit),
        (CODE, "trunk = elephant(1)\n", EditNotFound),
        (CODE * 100, EDIT, ContextExceeded),
    ],
)
def test_what_cannot_be_merged_is_refused(engine: Engine, code: str, edit: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        prepare(engine, code, edit, policy="review")


@pytest.mark.model
def test_the_model_chooses_one_of_two_interpretations(engine: Engine) -> None:
    prepared = prepare(engine, TABLES, COLUMN, path="a.sql")
    assert isinstance(prepared, Prepared) and prepared.request.margin == 0.0
    prompt = engine.tokenizer.decode(prepared.request.prompt)
    assert "fits line 3 and line 9" in prompt and "-  name TEXT NOT NULL,\n+  name TEXT," in prompt
    result = apply(lambda: engine, TABLES, COLUMN, path="a.sql")
    assert isinstance(result, Applied) and result.text in (FIRST, SECOND) and result.reasons
    assert result.usage.output_tokens > 0
