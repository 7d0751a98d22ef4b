"""How the model is asked to merge: policies as data, and Morph's prompt form."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from paceline.errors import ConfigError, InputError
from paceline.tasks.merge import strip_fence

_SYSTEM = "You merge code edits into files. You reply with the whole merged file and nothing else."

_TASK = """Merge the update into the file. In the update, comments such as "... existing code ..." stand for code of the file \
that stays as it is.
Write the whole file with the update merged: every line that the update does not change stays, in order, to the end of the \
file. Write no "... existing code ..." comment.
{instruction}
File:
```
{code}
```

Update:
```
{update}
```
"""

_REVIEW = """A tool merged an update into a file. Write out the merged file. Correct a line only where the tool put the update \
in wrongly.
{instruction}
Update:
```
{update}
```

Merged file:
```
{candidate}
```
"""

_EXAMPLE_CODE = """import os


def load(path):
    return open(path).read()


def save(path, text):
    open(path, "w").write(text)


def remove(path):
    os.remove(path)
"""
_EXAMPLE_UPDATE = """# ... existing code ...


def save(path, text):
    with open(path, "w") as file:
        file.write(text)


# ... existing code ...
"""
_EXAMPLE_MERGED = """import os


def load(path):
    return open(path).read()


def save(path, text):
    with open(path, "w") as file:
        file.write(text)


def remove(path):
    os.remove(path)
"""


@dataclass(frozen=True)
class Policy:
    """One way to ask. `template` takes code, update, instruction and candidate.

    `opened` starts the answer with a fence, so that the model writes code at once, and ends it at the closing one.
    `margin` is in nats: a candidate token at most that much less likely than the model's first choice is taken instead,
    which is not lossless (0 is).
    """

    name: str
    template: str = _TASK
    opened: bool = True
    example: bool = False
    margin: float = 0.0

    @property
    def closing(self) -> str:
        """What follows the file in the model's answer."""
        return "```" if self.opened else ""

    @property
    def stop(self) -> tuple[str, ...]:
        return ("\n```",) if self.opened else ()


POLICIES = {
    policy.name: policy
    for policy in (
        Policy("plain", opened=False),
        Policy("opened"),
        Policy("example", example=True),
        Policy("review", template=_REVIEW),
        Policy("margin", margin=3.0),
        Policy("review-margin", template=_REVIEW, margin=3.0),
    )
}
DEFAULT_POLICY = "review"


def policy_named(name: str) -> Policy:
    """The policy of that name. Raises ConfigError naming the nearest."""
    if name not in POLICIES:
        near = difflib.get_close_matches(name, POLICIES, n=1, cutoff=0.0)[0]
        raise ConfigError(f"there is no policy {name!r}; did you mean {near!r}? known: {', '.join(POLICIES)}")
    return POLICIES[name]


def messages(policy: Policy, code: str, update: str, instruction: str, candidate: str) -> list[dict[str, str]]:
    """The chat up to the answer."""
    chat = [{"role": "system", "content": _SYSTEM}]
    if policy.example:
        chat.append({"role": "user", "content": _fill(policy, _EXAMPLE_CODE, _EXAMPLE_UPDATE, "Close the file.", "")})
        chat.append({"role": "assistant", "content": f"```\n{_EXAMPLE_MERGED}```"})
    chat.append({"role": "user", "content": _fill(policy, code, update, instruction, candidate)})
    return chat


def opening(policy: Policy) -> str:
    """The start of the answer, which the model continues."""
    return "```\n" if policy.opened else ""


def read(policy: Policy, code: str, output: str) -> str:
    """The merged file in the model's answer: out of its fence, with line ends as the file has them."""
    text = output if policy.opened else strip_fence(output)
    text = text.removesuffix("```").rstrip("\n") if policy.opened else text.rstrip("\n")
    text = text.replace("\r\n", "\n")
    if code.endswith("\n") or not code:
        text += "\n"
    return text.replace("\n", "\r\n") if code.count("\r\n") * 2 > code.count("\n") else text


def morph_form(instruction: str, code: str, update: str) -> str:
    """Morph's apply prompt."""
    return f"<instruction>{instruction}</instruction>\n<code>{code}</code>\n<update>{update}</update>"


_INSTRUCTION = re.compile(r"\s*<instructions?>(.*?)</instructions?>\s*(?=<code>)", re.DOTALL)


def parse_morph(text: str) -> tuple[str, str, str]:
    """(instruction, code, update) of Morph's apply prompt; the instruction may be absent.

    Tags inside the code or the update stay: the code ends at the last `</code>` that an `<update>` follows. Raises
    InputError where code or update is missing.
    """
    found = _INSTRUCTION.match(text)
    instruction = found[1].strip() if found else ""
    rest = text[found.end() :] if found else text.lstrip()
    parts = re.fullmatch(r"<code>(.*)</code>\s*<update>(.*)</update>\s*", rest, re.DOTALL)
    if parts is None:
        raise InputError("the prompt must be <instruction>…</instruction><code>…</code><update>…</update>")
    return instruction, parts[1], parts[2]


def _fill(policy: Policy, code: str, update: str, instruction: str, candidate: str) -> str:
    values = {
        "code": code.rstrip("\n"),
        "update": strip_fence(update).strip("\n"),
        "instruction": f"What the update does: {instruction}\n" if instruction else "",
        "candidate": candidate.rstrip("\n"),
    }
    return policy.template.format(**values)
