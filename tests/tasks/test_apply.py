"""Fast Apply from end to end on a real model."""

from __future__ import annotations

import pytest

from paceline.config import EngineConfig
from paceline.engine.engine import Engine
from paceline.errors import ContextExceeded, EditNotFound, EmptyEdit
from paceline.models.checkpoint import open_checkpoint
from paceline.models.pull import pull
from paceline.tasks.apply import apply, ask, prepare
from paceline.tasks.merge import candidate_merge
from paceline.tasks.prompts import POLICIES, Policy, expected, fence_for, messages, opening
from paceline.types import StepOutput

CODE = "import os\n\n\ndef load(path):\n    return open(path).read()\n\n\ndef remove(path):\n    os.remove(path)\n"
EDIT = (
    "# ... existing code ...\ndef load(path):\n    with open(path) as file:\n        return file.read()\n\n\n"
    "# ... existing code ...\n"
)
MERGED = CODE.replace("    return open(path).read()\n", "    with open(path) as file:\n        return file.read()\n")
# SmolLM2 cannot copy a file: a boundless margin makes it follow the candidate, so that all around the model is exercised
FORCED = Policy("forced", margin=1e6)


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
def test_the_prompt_is_that_of_the_chat_encoded_whole(policy: str, code: str, edit: str) -> None:
    tokenizer = open_checkpoint(pull("smollm2-135m")).tokenizer()
    chosen, merge = POLICIES[policy], candidate_merge(code, edit)
    fence = fence_for(code, edit, merge.text)
    for instruction in ("", 'close "<update>"\nnow'):
        prompt, source = ask(tokenizer, chosen, code, edit, instruction, merge, fence)
        chat = messages(chosen, code, edit, instruction, merge.text)
        assert prompt == tokenizer.encode_chat(chat) + tokenizer.encode(opening(chosen, fence))
        answer = tokenizer.encode(expected(chosen, code, merge.text, fence))
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
        prepare(engine, code, edit)
