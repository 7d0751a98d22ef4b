"""Constrained decoding: masks of the tokens that a grammar allows, drafts included, by llguidance.

A grammar is Lark as llguidance reads it, with a rule `start`; `json_schema` and `regex` make one. A draft is constrained
in the step that verifies it: each of its positions has the mask that follows from the tokens before it, so a drafted step
chooses what plain steps would.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import llguidance
import numpy as np
import torch
from torch import Tensor

from paceline.engine.schemas import lark
from paceline.errors import BadGrammar
from paceline.models.tokenizer import Tokenizer

_MAX_RULES = 1000  # a chain of 1,500 overflows llguidance's native stack
_MAX_ERROR = 500  # characters of llguidance's error that are passed on


def json_schema(schema: Mapping[str, Any], lenient: bool = False) -> str:
    """The grammar of JSON texts that a JSON schema allows; `{}` allows every one. `lenient` is as in `bounded`.

    Raises BadGrammar for a schema that is nested too deeply.
    """
    return f"start: {lark(schema, lenient)}\n"


def regex(pattern: str) -> str:
    """The grammar of texts that match as a whole."""
    escaped = llguidance.regex_to_lark(pattern).replace("\n", "\\n")
    return f"start: /{escaped}/\n"


class Grammars:
    """Makes a tokenizer's grammar matchers. `vocab_size` is the model's, which may be more than the tokenizer's."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._tokenizer = llguidance.LLTokenizer(
            tokenizer.to_json(), n_vocab=vocab_size, eos_token=list(tokenizer.eos_tokens)
        )

    def matcher(self, grammar: str) -> GrammarMatcher:
        """Raises BadGrammar, with the reason, for a grammar that does not compile, or is too large.

        llguidance follows rules and references by recursion on the native stack; 1,500 in a chain crash the process.
        """
        size = grammar.count("\n") + grammar.count("$ref")
        if size > _MAX_RULES:
            raise BadGrammar(f"the grammar has {size} rules and references; at most {_MAX_RULES} are supported")
        matcher = GrammarMatcher(lambda: llguidance.LLMatcher(self._tokenizer, grammar, log_level=0), self.vocab_size)
        if matcher.problem:
            raise BadGrammar(matcher.problem)
        return matcher


class GrammarMatcher:
    """The state of one request's output in its grammar. `problem` is the reason why it cannot continue, if it cannot.

    `start` makes an llguidance matcher that has consumed nothing. One that exceeds llguidance's limits is unusable
    afterwards.
    """

    def __init__(self, start: Callable[[], llguidance.LLMatcher], vocab_size: int) -> None:
        self._start = start
        self._matcher = start()
        self._consumed: list[int] = []
        self.num_words = -(-vocab_size // 32)
        self.problem = _reason(self._matcher.get_error()) if self._matcher.is_error() else ""

    def advance(self, tokens: list[int]) -> str:
        """Consumes tokens of the output; returns the problem. Tokens after the grammar's end are ignored."""
        if self._matcher.is_error():  # perhaps by a draft that the output does not follow
            self._restart()
        self._consumed += tokens
        left = False
        if not self._matcher.is_stopped():
            left = self._matcher.try_consume_tokens(tokens) < len(tokens) and not self._matcher.is_stopped()
        if left or self._matcher.is_error():
            reason = self._matcher.get_error().partition("\n")[0] or "the output left it where a limit was exceeded"
            self.problem = f"the grammar is too complex to follow to the output's end: {reason}"
        return self.problem

    def masks(self, tokens: list[int], parents: list[int]) -> Any:
        """[Q, W] int32, one bit a token: the tokens allowed after each of a request's Q queries.

        `tokens[0]` is the root, consumed already; `parents` are query indices, the root's 0. Rows after a drafted token
        that the grammar forbids are all ones: no draft is accepted there.
        """
        bits = np.full((len(tokens), self.num_words), -1, dtype=np.int32)
        rows = np.empty((len(tokens), self.num_words), dtype=np.int32)
        for index, path in enumerate(_paths(parents)):
            if index and self._matcher.is_error():  # by the path before
                self._restart()
            rows[: len(path) + 1] = -1
            # missing in llguidance's type stubs: fills a row after the root and after each token until a forbidden one
            fill: Any = self._matcher.unsafe_compute_mask_ptr_with_draft_token  # type: ignore[attr-defined]
            fill(rows.ctypes.data, 4 * self.num_words, [tokens[query] for query in path])
            bits[[0, *path]] = rows[: len(path) + 1]
        return bits

    def _restart(self) -> None:
        """Replaces an unusable matcher by one that has consumed the output so far."""
        self._matcher = self._start()
        self._matcher.try_consume_tokens(self._consumed)
        self.masks([0], [0])


def _paths(parents: list[int]) -> list[list[int]]:
    """The queries from the root, which is left out, to each leaf; one empty path where there is the root alone."""
    assert all(0 <= parent < query for query, parent in enumerate(parents[1:], 1)), "a parent comes before its children"
    inner = set(parents[1:])
    paths = []
    for leaf in range(len(parents)):
        if leaf in inner or (leaf == 0 and len(parents) > 1):
            continue
        path = []
        while leaf:
            path.append(leaf)
            leaf = parents[leaf]
        paths.append(path[::-1])
    return paths


def _reason(error: str) -> str:
    """llguidance's error message, without the schema's text or, of Lark, all but its first lines."""
    schema = re.search(r"failed to compile JSON schema: (.*?)(\n +\d+ \||\Z)", error, re.DOTALL)
    if schema is None:
        return f"the grammar does not compile: {error[:_MAX_ERROR]}"
    reason = re.sub(r"Unimplemented keys: \[(.*)\]", r"\1 cannot be enforced, as a strict schema must be", schema[1])
    return f"the JSON schema does not compile: {reason.strip()[:_MAX_ERROR]}"


def forbid(logits: Tensor, bits: Any) -> None:
    """Sets the logits [Q, V] whose bit in `bits` [Q, W] is 0 to minus infinity, in place."""
    eights = torch.from_numpy(bits.view(np.uint8)).to(logits.device)
    shifts = torch.arange(8, dtype=torch.uint8, device=logits.device)
    allowed = (eights[:, :, None] >> shifts & 1).flatten(1)[:, : logits.shape[1]]
    logits.masked_fill_(allowed == 0, float("-inf"))
