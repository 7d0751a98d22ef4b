"""Fast Apply: a rule merges the edit, the model is asked where the policy says so, checks judge the result."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from paceline.errors import ContextExceeded, EmptyEdit
from paceline.tasks.checks import check
from paceline.tasks.merge import Merge, candidate_merge
from paceline.tasks.prompts import (
    DEFAULT_POLICY,
    Policy,
    expected,
    fence_for,
    messages,
    opening,
    policy_named,
    read,
    shown,
    stops,
    told,
)
from paceline.tasks.unified import unified_diff
from paceline.types import FinishReason, Request, Sampling, StepOutput, Usage

if TYPE_CHECKING:  # not imported for a merge that needs no model
    from paceline.engine.engine import Engine
    from paceline.models.tokenizer import Tokenizer

_OUTPUT_SLACK = 256  # output tokens beyond the candidate merge's own before the output is cut


@dataclass(frozen=True)
class Applied:
    """A merge. `reasons` says why it is flagged; empty means that every check passed.

    `source` says whose text it is: "rule" (the candidate) or "model".
    """

    code: str
    text: str
    reasons: tuple[str, ...]
    usage: Usage
    policy: str
    path: str = "file"
    source: str = "model"

    def diff(self) -> str:
        """The change as a unified diff."""
        return unified_diff(self.code, self.text, self.path)

    def as_dict(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "diff": self.diff(),
            "flagged": bool(self.reasons),
            "reasons": list(self.reasons),
            "policy": self.policy,
            "source": self.source,
            "usage": dataclasses.asdict(self.usage),
        }


@dataclass(frozen=True)
class Prepared:
    """An edit made ready for an engine: what to submit, and what the result is judged by."""

    code: str
    update: str
    policy: Policy
    fence: str
    merge: Merge
    request: Request
    path: str | None

    def conclude(self, output: str, usage: Usage, cut_off: bool) -> Applied:
        """Reads the model's output as a file and checks it.

        A policy with a rule takes the model's text only where it is a reading of the edit, else the candidate's.
        """
        text = read(self.policy, self.code, output, self.fence, self.merge.text)
        other = self.merge.other
        reading = other if other is not None and text == other.text else self.merge
        reasons = check(self.code, self.update, text, self.path, reading)
        if cut_off:
            reasons = ("the output was cut off at its token limit", *reasons)
        source = "model"
        if self.policy.rule and text != reading.text:
            text, source = self.merge.text, "rule"
            reasons = check(self.code, self.update, text, self.path, self.merge)
        return Applied(self.code, text, reasons, usage, self.policy.name, self.path or "file", source)


def prepare(
    engine: Engine | Callable[[], Engine],
    code: str,
    update: str,
    instruction: str = "",
    *,
    path: str | None = None,
    policy: str | Policy | None = None,
    drafted: bool = True,
) -> Prepared | Applied:
    """Makes the candidate merge, and the prompt where the model is to be asked; the merge itself where it is not.

    A policy with a rule asks the model which of two readings of the edit is meant, and so only where there are two.

    `engine` may be a function that gives it, called where it is needed. With `drafted` False the candidate is not given to
    the drafter (for comparison; the policy stays). Raises EmptyEdit, EditNotFound, ContextExceeded before any compute.
    """
    if not update.strip():
        raise EmptyEdit("the edit is empty")
    chosen = policy if isinstance(policy, Policy) else policy_named(policy or DEFAULT_POLICY)
    merge = candidate_merge(code, update, path, instruction)
    if chosen.rule:
        reasons = check(code, update, merge.text, path, merge)
        if not reasons or merge.other is None:
            return Applied(code, merge.text, reasons, Usage(), chosen.name, path or "file", "rule")
    engine = engine() if callable(engine) else engine
    fence = fence_for(code, update, merge.text)
    instruction = told(instruction, code, merge) if chosen.reviews else instruction
    prompt, source, length = _ask(engine.tokenizer, chosen, code, update, instruction, merge, fence)
    limit = len(source) + length + _OUTPUT_SLACK
    context = engine.config.max_context or 0
    if len(prompt) + limit > context:
        raise ContextExceeded(
            f"the file and its edit need {len(prompt)} prompt and up to {limit} output tokens; "
            f"this model's maximum context length is {context} tokens"
        )
    sampling = Sampling(max_tokens=limit, stop=stops(chosen, fence))
    request = Request(prompt, sampling, sources=(source,) if drafted else (), margin=chosen.margin if drafted else 0.0)
    return Prepared(code, update, chosen, fence, merge, request, path)


def ask(
    tokenizer: Tokenizer, policy: Policy, code: str, update: str, instruction: str, merge: Merge, fence: str
) -> tuple[list[int], list[int]]:
    """The prompt up to where the model goes on, and what it writes if it agrees with the candidate, as tokens."""
    return _ask(tokenizer, policy, code, update, instruction, merge, fence)[:2]


def _ask(
    tokenizer: Tokenizer, policy: Policy, code: str, update: str, instruction: str, merge: Merge, fence: str
) -> tuple[list[int], list[int], int]:
    """What `ask` gives, and how many tokens the update is. No long text is encoded twice, where its tokens stand apart."""
    texts = shown(policy, code, update, merge.text)
    tokens = {name: tokenizer.encode(f"{text}\n") for name, text in texts.items()}
    answer = expected(policy, code, merge.text, fence)
    prompt = _put_in(tokenizer, policy, instruction, fence, texts, tokens)
    start = f"{texts.get('candidate')}\n"
    if prompt is not None and answer.startswith(start):
        draft = tokens["candidate"] + tokenizer.encode(answer.removeprefix(start))
    else:
        draft = tokenizer.encode(answer)
    if prompt is None:
        prompt = tokenizer.encode_chat(messages(policy, code, update, instruction, merge.text, fence))
    prompt += tokenizer.encode(opening(policy, fence))
    return prompt, draft + list(tokenizer.eos_tokens[:1]), len(tokens["update"])


def _put_in(
    tokenizer: Tokenizer,
    policy: Policy,
    instruction: str,
    fence: str,
    texts: dict[str, str],
    tokens: dict[str, list[int]],
) -> list[int] | None:
    """The chat's tokens: those of a chat with a short text for each of `texts`, and `tokens` put in in their places.

    The short ones have the ends of the long ones, so that what stands around takes them up alike. None where the tokens
    of one are not found, or twice, as where an end's token is partly of what stands around.
    """
    short = {name: f'{text[:50]}"<{name}>"{text[-50:]}' for name, text in texts.items()}
    code, update, candidate = (short.get(name, "") for name in ("code", "update", "candidate"))
    prompt = tokenizer.encode_chat(messages(policy, code, update, instruction, candidate, fence))
    places = []
    for name, text in short.items():
        part = tokenizer.encode(f"{text}\n")
        size = len(part)
        found = [row for row, each in enumerate(prompt) if each == part[0] and prompt[row : row + size] == part]
        if len(found) != 1:
            return None
        places.append((found[0], found[0] + size, tokens[name]))
    for start, stop, put in sorted(places, reverse=True):
        prompt[start:stop] = put
    return prompt


def apply(
    engine: Engine | Callable[[], Engine],
    code: str,
    update: str,
    instruction: str = "",
    *,
    path: str | None = None,
    policy: str | Policy | None = None,
    on_step: Callable[[StepOutput], None] | None = None,
) -> Applied:
    """Merges `update` into `code`. `engine` may be a function that gives it, called where the model is needed.

    `on_step` sees every step as it comes.
    """
    needed = functools.cache(engine if callable(engine) else lambda: engine)
    prepared = prepare(needed, code, update, instruction, path=path, policy=policy)
    if isinstance(prepared, Applied):
        return prepared
    parts: list[str] = []
    last: StepOutput | None = None
    for last in needed().stream(prepared.request):
        parts.append(last.text)
        if on_step is not None:
            on_step(last)
    assert last is not None and last.usage is not None
    if last.error is not None:
        raise last.error
    return prepared.conclude("".join(parts), last.usage, last.finish is FinishReason.LENGTH)


@functools.cache
def shared_engine(model: str) -> Engine:
    """An engine with default settings, kept for the process."""
    from paceline.engine.engine import Engine

    return Engine.load(model)
