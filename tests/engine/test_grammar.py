"""Output constrained by a grammar: it is in the grammar, and drafts, batches and preemption change nothing."""

from __future__ import annotations

import json
import random
import re

import pytest

from paceline.engine.grammar import Grammars, json_schema, regex
from paceline.errors import BadGrammar, RequestError
from paceline.types import FinishReason, Request, Sampling
from tests.engine.test_engine import everything_is_back
from tests.serve.service import byte_tokenizer, tiny

SCHEMA = {
    "type": "object",
    "properties": {
        "path": {"type": "string", "maxLength": 12},
        "lines": {"type": "array", "items": {"type": "integer"}, "maxItems": 4},
        "mode": {"enum": ["read", "write"]},
    },
    "required": ["path", "lines", "mode"],
    "additionalProperties": False,
}
PATCH = 'start: "*** Begin Patch\\n" line{1,5} "*** End Patch"\nline: /[+ -][a-z]{0,5}\\n/\n'
GRAMMARS = {"json": json_schema(SCHEMA), "regex": regex("(ab|c[0-9]){2,6}!"), "lark": PATCH}
TOKENIZER = byte_tokenizer()


def requests(sources: bool, temperature: float = 0.0) -> list[Request]:
    """Each grammar twice and two free requests; the sources are what could have been said, in part forbidden."""
    draw = random.Random(3)
    predicted = {
        "json": '{"path": "src/a.py", "lines": [1, 22, 3], "mode": "write"}',
        "regex": "abc1abzzc9!",
        "lark": "*** Begin Patch\n+abc\n-de\n bad line here\n*** End Patch",
    }
    asked = []
    for index, name in enumerate(["json", "regex", "lark", "json", "regex", "lark", "free", "free"]):
        prompt = TOKENIZER.encode("".join(draw.choice("abc {}") for _ in range(20)))
        sampling = Sampling(
            max_tokens=240 if name != "free" else 60,
            temperature=temperature,
            seed=index,
            grammar=GRAMMARS.get(name),
            ignore_eos=name == "free",
        )
        predictions = (TOKENIZER.encode(predicted.get(name, "abcabc")),) if sources else ()
        asked.append(Request(prompt, sampling, predictions))
    return asked


def check(name: str, text: str) -> None:
    if name == "json":
        value = json.loads(text)
        assert set(value) == {"path", "lines", "mode"} and value["mode"] in ("read", "write")
    elif name == "regex":
        assert re.fullmatch("(ab|c[0-9]){2,6}!", text)
    else:
        assert re.fullmatch(r"\*\*\* Begin Patch\n([+ -][a-z]{0,5}\n)+\*\*\* End Patch", text)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_batches_and_preemption_change_nothing(temperature: float) -> None:
    plain = tiny(TOKENIZER, drafter="none")
    expected = [plain.generate([each])[0] for each in requests(False, temperature)]
    ended = 0
    for name, done in zip(["json", "regex", "lark"] * 2, expected, strict=False):
        if done.finish is FinishReason.STOP:
            check(name, done.text)
            ended += 1
    assert ended >= 4
    for settings in ({}, {"fixed_draft": 8}, {"fixed_draft": 64}, {"cache_tokens": 320, "fixed_draft": 16}):
        engine = tiny(TOKENIZER, **settings)
        drafted = engine.generate(requests(True, temperature))
        assert [each.tokens for each in drafted] == [each.tokens for each in expected], settings
        assert settings.get("cache_tokens") is None or engine.scheduler.num_preempted
        everything_is_back(engine)
    held = [each for each, name in zip(drafted, range(6), strict=False)]
    assert temperature or any(each.usage.accepted_tokens for each in held)


def test_a_draft_that_is_allowed_is_accepted_where_the_grammar_leaves_no_choice() -> None:
    text = "".join(f"line {index}, as it must be;" for index in range(12))
    engine = tiny(TOKENIZER, fixed_draft=64)
    grammar = "start: " + json.dumps(text) + "\n"
    sampling = Sampling(max_tokens=400, grammar=grammar)
    done = engine.generate([Request([1, 2, 3], sampling, (TOKENIZER.encode(text),))])[0]
    assert done.text == text and done.finish is FinishReason.STOP
    assert done.usage.steps <= len(text) // 60 + 2


def test_masks_of_trees_are_those_of_plain_steps() -> None:
    """Every query's mask is that of a fresh matcher that took the query's own path."""
    grammars = Grammars(TOKENIZER, TOKENIZER.vocab_size + 70)
    begun = TOKENIZER.encode('{"path": "')
    branches = [TOKENIZER.encode('a", "lines"'), TOKENIZER.encode('"]'), TOKENIZER.encode("b"), [0]]
    tokens, parents = [begun[-1]], [0]

    def grow(parent: int, branch: list[int]) -> None:
        for token in branch:
            tokens.append(token)
            parents.append(parent)
            parent = len(tokens) - 1

    for branch in branches:
        grow(0, branch)
    grow(1, TOKENIZER.encode('x", "lines": ['))  # after the first token of the first branch, and once more after that
    grow(len(tokens) - 2, TOKENIZER.encode("}"))
    matcher = grammars.matcher(GRAMMARS["json"])
    matcher.advance(begun)
    bits = matcher.masks(tokens, parents)
    assert sum(parent == 0 for parent in parents[1:]) == len(branches) and parents.count(1) == 2
    for index in range(len(tokens)):
        path, query = [], index
        while query:
            path.insert(0, tokens[query])
            query = parents[query]
        alone = grammars.matcher(GRAMMARS["json"])
        alone.advance(begun)
        forbidden = False
        for token in path:
            forbidden = forbidden or not alone.masks([0], [0])[0][token // 32] >> (token % 32) & 1
            alone.advance([token])
        if not forbidden:
            assert (bits[index] == alone.masks([0], [0])[0]).all(), index


def test_a_limit_exceeded_on_one_path_of_a_tree_leaves_the_others_right() -> None:
    grammars = Grammars(TOKENIZER, TOKENIZER.vocab_size)
    tokens = [0, *TOKENIZER.encode("ac")]
    matcher = grammars.matcher(GRAMMARS["regex"])
    expected = matcher.masks(tokens, [0, 0, 0])
    inner = matcher._matcher

    class Exceeding:
        """llguidance's matcher, whose limits the first path exceeds."""

        def unsafe_compute_mask_ptr_with_draft_token(self, *arguments: object) -> None:
            inner.unsafe_compute_mask_ptr_with_draft_token(*arguments)  # type: ignore[attr-defined]
            inner.consume_tokens(TOKENIZER.encode("!"))

        def is_error(self) -> bool:
            return inner.is_error()

    matcher._matcher = Exceeding()  # type: ignore[assignment]
    assert (matcher.masks(tokens, [0, 0, 0]) == expected).all()
    assert matcher._matcher is not inner and not matcher._matcher.is_error()


@pytest.mark.parametrize("parents", [[0, 0, 2], [0, 1], [0, 2, 1], [0, 0, -1]])
def test_a_parent_that_does_not_come_before_its_child_is_refused(parents: list[int]) -> None:
    matcher = Grammars(TOKENIZER, TOKENIZER.vocab_size).matcher(GRAMMARS["regex"])
    with pytest.raises(AssertionError, match="before its children"):
        matcher.masks([97] * len(parents), parents)


@pytest.mark.parametrize("grammar", ["start: nothing", json_schema({"type": "strin"}), regex("(a"), "{"])
def test_a_grammar_that_does_not_compile_is_refused(grammar: str) -> None:
    engine = tiny(TOKENIZER)
    with pytest.raises(BadGrammar, match="does not compile"):
        engine.submit(Request([1, 2], Sampling(grammar=grammar)))
    everything_is_back(engine)


def test_min_tokens_with_a_grammar_is_refused() -> None:
    with pytest.raises(RequestError, match="grammar"):
        Sampling(grammar="start: /a/", min_tokens=3)


def test_a_grammar_that_becomes_too_much_fails_and_a_draft_that_is_not_followed_does_not_make_it_so() -> None:
    words = " | ".join('"a" w ' * count for count in range(1, 70))
    grammar = f'start: "say: " w "."\nw: {words} | "a"\n'
    source = TOKENIZER.encode(f"say: {'a' * 40}.")
    for settings, sources in (({"drafter": "none"}, ()), ({"fixed_draft": 32}, (source,))):
        engine = tiny(TOKENIZER, **settings)
        ends = Sampling(max_tokens=60, grammar=grammar, logit_bias={ord("."): 100.0})
        assert engine.generate([Request([1, 2], ends, sources)])[0].text == "say: a."
        goes_on = Sampling(max_tokens=60, grammar=grammar, logit_bias={ord("a"): 100.0})
        error = engine.generate([Request([1, 2], goes_on, sources)])[0].error
        assert isinstance(error, BadGrammar) and "too complex to follow" in str(error)
        everything_is_back(engine)
