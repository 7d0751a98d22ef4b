"""Output held to a grammar, drafts included: masks of the tokens that may follow, by llguidance.

A grammar is Lark as llguidance reads it, with a rule `start`; `json_schema` and `regex` make one. A draft is checked in
the step that verifies it: each of its positions has the mask of the tokens before it, so that a drafted step chooses what
plain steps would.
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

_MOST_RULES = 1000
_LONGEST_ERROR = 500  # characters


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
    """Makes a tokenizer's followers. `vocab_size` is the model's, which may be more than the tokenizer's."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._tokenizer = llguidance.LLTokenizer(
            tokenizer.to_json(), n_vocab=vocab_size, eos_token=list(tokenizer.eos_tokens)
        )

    def follow(self, grammar: str) -> Follower:
        """Raises BadGrammar, with what is wrong, for a grammar that does not compile, or is too large.

        llguidance follows rules and references by recursion on the native stack, and 1,500 in a chain end the process.
        """
        size = grammar.count("\n") + grammar.count("$ref")
        if size > _MOST_RULES:
            raise BadGrammar(f"the grammar has {size} rules and references; at most {_MOST_RULES} are followed")
        follower = Follower(lambda: llguidance.LLMatcher(self._tokenizer, grammar, log_level=0), self.vocab_size)
        if follower.problem:
            raise BadGrammar(follower.problem)
        return follower


class Follower:
    """Where one request's output stands in its grammar. `problem` says why it can be followed no further, if it cannot.

    `start` makes a matcher that has taken nothing. One that passes llguidance's limits is of no use any more.
    """

    def __init__(self, start: Callable[[], llguidance.LLMatcher], vocab_size: int) -> None:
        self._start = start
        self._matcher = start()
        self._taken: list[int] = []
        self.num_words = -(-vocab_size // 32)
        self.problem = _told(self._matcher.get_error()) if self._matcher.is_error() else ""

    def advance(self, tokens: list[int]) -> str:
        """Takes tokens of the output; returns the problem. What comes after the grammar's end is ignored."""
        if self._matcher.is_error():  # perhaps by a draft that the output does not follow
            self._matcher = self._start()
            self._matcher.try_consume_tokens(self._taken)
            self.masks([0], [0])
        self._taken += tokens
        left = False
        if not self._matcher.is_stopped():
            left = self._matcher.try_consume_tokens(tokens) < len(tokens) and not self._matcher.is_stopped()
        if left or self._matcher.is_error():
            reason = self._matcher.get_error().partition("\n")[0] or "the output left it where a limit was passed"
            self.problem = f"the grammar is too much to follow to the output's end: {reason}"
        return self.problem

    def masks(self, tokens: list[int], branch_starts: list[int]) -> Any:
        """[Q, W] int32, a bit a token: what may follow query i, for a step's Q queries as AttentionBatch draws them.

        `tokens[0]` is the root, taken already. Rows after a drafted token that the grammar forbids are full of ones: no
        draft is accepted there.
        """
        bits = np.full((len(tokens), self.num_words), -1, dtype=np.int32)
        rows = np.empty_like(bits)
        starts = sorted({max(1, start) for start in branch_starts[1:]}) or [1]
        for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
            branch = tokens[start:end]
            rows[: len(branch) + 1] = -1
            # missing in llguidance's type stubs: fills a row after the root and after each token until a forbidden one
            fill: Any = self._matcher.unsafe_compute_mask_ptr_with_draft_token  # type: ignore[attr-defined]
            fill(rows.ctypes.data, 4 * self.num_words, branch)
            bits[0] = rows[0]
            bits[start:end] = rows[1 : len(branch) + 1]
        return bits


def _told(error: str) -> str:
    """llguidance's words for what does not compile, without the schema or, of Lark, all but its first lines."""
    schema = re.search(r"failed to compile JSON schema: (.*?)(\n +\d+ \||\Z)", error, re.DOTALL)
    if schema is None:
        return f"the grammar does not compile: {error[:_LONGEST_ERROR]}"
    reason = re.sub(r"Unimplemented keys: \[(.*)\]", r"\1 cannot be enforced, as a strict schema must be", schema[1])
    return f"the JSON schema does not compile: {reason.strip()[:_LONGEST_ERROR]}"


def forbid(logits: Tensor, bits: Any) -> None:
    """Sets the logits [Q, V] whose bit in `bits` [Q, W] is 0 to minus infinity, in place."""
    eights = torch.from_numpy(bits.view(np.uint8)).to(logits.device)
    shifts = torch.arange(8, dtype=torch.uint8, device=logits.device)
    allowed = (eights[:, :, None] >> shifts & 1).flatten(1)[:, : logits.shape[1]]
    logits.masked_fill_(allowed == 0, float("-inf"))
