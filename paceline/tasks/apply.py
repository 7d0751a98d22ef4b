"""Fast Apply: merges an edit by rule, asks the model if the policy says so, and checks the result."""

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
    answer_start,
    chat_messages,
    expected_answer,
    fence_for,
    merged_text,
    policy_named,
    shown_texts,
    stop_strings,
    with_warnings,
)
from paceline.tasks.unified_diff import unified_diff
from paceline.types import FinishReason, Request, Sampling, StepOutput, Usage

if TYPE_CHECKING:  # a merge without a model imports neither torch nor the engine
    from paceline.engine.client import EngineClient
    from paceline.engine.engine import Engine
    from paceline.models.tokenizer import Tokenizer

_OUTPUT_SLACK = 256  # bounds the output: tokens beyond those of the candidate merge and of the update; not tuned


@dataclass(frozen=True)
class Applied:
    """A merge result. It is flagged if `reasons` is not empty; then these say why. Without reasons every check passed.

    `source` is where the text comes from: "rule" (the candidate merge) or "model".
    """

    code: str
    text: str
    reasons: tuple[str, ...]
    usage: Usage
    policy: str
    path: str = "file"
    source: str = "model"

    def diff(self) -> str:
        """The change from `code` to `text` as a unified diff."""
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
    """An edit that the model is to merge: the request to submit, and what its output is checked against."""

    code: str
    update: str
    policy: Policy
    fence: str
    merge: Merge
    request: Request
    path: str | None

    def conclude(self, output: str, usage: Usage, cut_off: bool) -> Applied:
        """Reads the merged file from the model's output and checks it. `cut_off`: the output ended at its token limit.

        A policy with `rule` accepts the model's text only if it equals one of the edit's two interpretations; otherwise the
        candidate merge is the result.
        """
        text = merged_text(self.policy, self.code, output, self.fence, self.merge.text)
        alternative = self.merge.alternative
        interpretation = alternative if alternative is not None and text == alternative.text else self.merge
        reasons = check(self.code, self.update, text, self.path, interpretation)
        if cut_off:
            reasons = ("the output was cut off at its token limit", *reasons)
        source = "model"
        if self.policy.rule and text != interpretation.text:
            text, source = self.merge.text, "rule"
            reasons = check(self.code, self.update, text, self.path, self.merge)
        return Applied(self.code, text, reasons, usage, self.policy.name, self.path or "file", source)


def prepare(
    engine: EngineClient | Callable[[], EngineClient],
    code: str,
    update: str,
    instruction: str = "",
    *,
    path: str | None = None,
    policy: str | Policy | None = None,
    drafted: bool = True,
) -> Prepared | Applied:
    """Makes the candidate merge. Returns the request for the model, or the result itself if no model is needed.

    A policy with `rule` asks the model only about an edit that has two interpretations. `engine` may be a function that
    returns one; it is called only if needed. `drafted=False` does not give the candidate to the drafter, for comparison.
    Raises EmptyEdit, EditNotFound or ContextExceeded before any compute.
    """
    if not update.strip():
        raise EmptyEdit("the edit is empty")
    chosen = policy if isinstance(policy, Policy) else policy_named(policy or DEFAULT_POLICY)
    merge = candidate_merge(code, update, path, instruction)
    if chosen.rule:
        reasons = check(code, update, merge.text, path, merge)
        if not reasons or merge.alternative is None:
            return Applied(code, merge.text, reasons, Usage(), chosen.name, path or "file", "rule")
    engine = engine() if callable(engine) else engine
    fence = fence_for(code, update, merge.text)
    instruction = with_warnings(instruction, code, merge) if chosen.reviews else instruction
    prompt, source, length = _prompt_draft_and_length(engine.tokenizer, chosen, code, update, instruction, merge, fence)
    limit = len(source) + length + _OUTPUT_SLACK
    context = engine.config.max_context or 0
    if len(prompt) + limit > context:
        raise ContextExceeded(
            f"the file and its edit need {len(prompt)} prompt and up to {limit} output tokens; "
            f"this model's maximum context length is {context} tokens"
        )
    sampling = Sampling(max_tokens=limit, stop=stop_strings(chosen, fence))
    request = Request(prompt, sampling, sources=(source,) if drafted else (), margin=chosen.margin if drafted else 0.0)
    return Prepared(code, update, chosen, fence, merge, request, path)


def prompt_and_draft(
    tokenizer: Tokenizer, policy: Policy, code: str, update: str, instruction: str, merge: Merge, fence: str
) -> tuple[list[int], list[int]]:
    """(the prompt, the draft), as tokens. The draft is what the model writes if it agrees with the candidate."""
    return _prompt_draft_and_length(tokenizer, policy, code, update, instruction, merge, fence)[:2]


def _prompt_draft_and_length(
    tokenizer: Tokenizer, policy: Policy, code: str, update: str, instruction: str, merge: Merge, fence: str
) -> tuple[list[int], list[int], int]:
    """What `prompt_and_draft` returns, and the number of tokens of the update. Encodes each long text once if it can."""
    texts = shown_texts(policy, code, update, merge.text)
    tokens = {name: tokenizer.encode(f"{text}\n") for name, text in texts.items()}
    answer = expected_answer(policy, code, merge.text, fence)
    prompt = _spliced_prompt(tokenizer, policy, instruction, fence, texts, tokens)
    start = f"{texts.get('candidate')}\n"
    if prompt is not None and answer.startswith(start):
        draft = tokens["candidate"] + tokenizer.encode(answer.removeprefix(start))
    else:
        draft = tokenizer.encode(answer)
    if prompt is None:
        prompt = tokenizer.encode_chat(chat_messages(policy, code, update, instruction, merge.text, fence))
    prompt += tokenizer.encode(answer_start(policy, fence))
    return prompt, draft + list(tokenizer.eos_tokens[:1]), len(tokens["update"])


def _spliced_prompt(
    tokenizer: Tokenizer,
    policy: Policy,
    instruction: str,
    fence: str,
    texts: dict[str, str],
    tokens: dict[str, list[int]],
) -> list[int] | None:
    """The chat's tokens, made by encoding a chat with short placeholder texts and replacing those by `tokens`.

    A placeholder has the first and last 50 characters of its text, so that the tokens around it are the same. None if the
    tokens of a placeholder are not found exactly once, as when a token spans its edge: the chat is then encoded whole.
    """
    short = {name: f'{text[:50]}"<{name}>"{text[-50:]}' for name, text in texts.items()}
    code, update, candidate = (short.get(name, "") for name in ("code", "update", "candidate"))
    prompt = tokenizer.encode_chat(chat_messages(policy, code, update, instruction, candidate, fence))
    places = []
    for name, text in short.items():
        part = tokenizer.encode(f"{text}\n")
        size = len(part)
        found = [row for row, each in enumerate(prompt) if each == part[0] and prompt[row : row + size] == part]
        if len(found) != 1:
            return None
        places.append((found[0], found[0] + size, tokens[name]))
    for start, stop, tokens_of in sorted(places, reverse=True):
        prompt[start:stop] = tokens_of
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
    """Merges `update` into `code`; arguments and errors as for `prepare`.

    `on_step` is called with every step's output.
    """
    engine_of = functools.cache(engine if callable(engine) else lambda: engine)
    prepared = prepare(engine_of, code, update, instruction, path=path, policy=policy)
    if isinstance(prepared, Applied):
        return prepared
    parts: list[str] = []
    last: StepOutput | None = None
    for last in engine_of().stream(prepared.request):
        parts.append(last.text)
        if on_step is not None:
            on_step(last)
    assert last is not None and last.usage is not None
    if last.error is not None:
        raise last.error
    return prepared.conclude("".join(parts), last.usage, last.finish is FinishReason.LENGTH)


@functools.cache
def shared_engine(model: str) -> Engine:
    """An engine with default settings, loaded once a process."""
    from paceline.engine.engine import Engine

    return Engine.load(model)
