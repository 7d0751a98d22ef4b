"""The prompts that ask a model to merge: policies as data, and Morph's prompt form."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from paceline.errors import ConfigError, InputError
from paceline.tasks.lines import BOM, Lines
from paceline.tasks.merge import Merge, strip_fence
from paceline.tasks.search_replace import apply_blocks

_SYSTEM = "You merge code edits into files. You reply with the whole merged file and nothing else."

_TASK = """\
Merge the update into the file. In the update, comments such as "... existing code ..." stand for code of the file \
that stays as it is.
Write the whole file with the update merged: every line that the update does not change stays, in order, to the end \
of the file. Write no "... existing code ..." comment.
{instruction}
File:
{fence}
{code}
{fence}

Update:
{fence}
{update}
{fence}
"""

_REVIEW = """\
A tool merged an update into a file. Write out the merged file. Correct a line only where the tool put the update \
in wrongly.
{instruction}
Update:
{fence}
{update}
{fence}

Merged file:
{fence}
{candidate}
{fence}
"""

_BLOCKS = """\
Make the update's change to the file. In the update, comments such as "... existing code ..." stand for code of the \
file that stays as it is.
Reply with one block for each place that changes. Between SEARCH and ======= copy the lines of the file that change, \
exactly, with a line or two around them; between ======= and REPLACE write what they become.
{instruction}
File:
{fence}
{code}
{fence}

Update:
{fence}
{update}
{fence}
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


_MAX_WARNINGS = 3  # bounds the prompt: warnings shown to the model
_MAX_LINES = 40  # bounds the prompt: deleted lines, and lines of the alternative's diff, shown to the model
FENCE = "```"
_FENCE_LINE = re.compile(r"^ {0,3}(`{3,})", re.MULTILINE)
_SEARCH = "<<<<<<< SEARCH"


@dataclass(frozen=True)
class Policy:
    """One way to ask the model.

    `template` has the fields code, update, instruction, candidate and fence. `opened`: the answer starts inside a fence, so
    that the model writes code at once, and ends at the closing fence. `example`: a worked example precedes the question.
    `blocks`: the answer is SEARCH/REPLACE blocks and not the whole file. `margin`, in nats: a candidate token at most that
    much less likely than the model's first choice is accepted; only 0 is lossless. `rule`: a candidate without warnings is the
    answer, and the model only decides between two interpretations of an ambiguous edit.
    """

    name: str
    template: str = _TASK
    opened: bool = True
    example: bool = False
    blocks: bool = False
    margin: float = 0.0
    rule: bool = False

    @property
    def reviews(self) -> bool:
        """Whether the prompt shows the candidate merge."""
        return "{candidate}" in self.template


# a margin of 3 nats: at least 1/20 of the first choice's probability; python -m benchmarks.policies compares policies
POLICIES = {
    policy.name: policy
    for policy in (
        Policy("plain", opened=False),
        Policy("opened"),
        Policy("example", example=True),
        Policy("block", template=_BLOCKS, blocks=True),
        Policy("review", template=_REVIEW),
        Policy("margin", margin=3.0),
        Policy("review-margin", template=_REVIEW, margin=3.0),
        Policy("auto", template=_REVIEW, rule=True),
    )
}
# chosen with python -m benchmarks.policies: on every set as exact as the better of rule and model
DEFAULT_POLICY = "auto"


def policy_named(name: str) -> Policy:
    """The policy of that name. Raises ConfigError, with the nearest name, if there is none."""
    if name not in POLICIES:
        near = difflib.get_close_matches(name, POLICIES, n=1, cutoff=0.0)[0]
        raise ConfigError(f"there is no policy {name!r}; did you mean {near!r}? known: {', '.join(POLICIES)}")
    return POLICIES[name]


def fence_for(*texts: str) -> str:
    """A fence that no line of the texts can close: at least three backticks, one more than the longest fence in them."""
    fenced = [text for text in texts if FENCE in text]
    longest = max((len(found[1]) for text in fenced for found in _FENCE_LINE.finditer(text)), default=0)
    return "`" * max(len(FENCE), longest + 1)


def shown_texts(policy: Policy, code: str, update: str, candidate: str) -> dict[str, str]:
    """The texts that the policy's template shows, by field name, each as it is between two fences."""
    code, update, candidate = (text.removeprefix(BOM) for text in (code, strip_fence(update), candidate))
    texts = {"code": code.rstrip("\n"), "update": update.strip("\n"), "candidate": candidate.rstrip("\n")}
    return {name: text for name, text in texts.items() if f"{{{name}}}" in policy.template}


def chat_messages(
    policy: Policy, code: str, update: str, instruction: str, candidate: str, fence: str = ""
) -> list[dict[str, str]]:
    """The chat up to the answer. Without `fence` one is chosen for these texts."""
    chat = [{"role": "system", "content": _SYSTEM}]
    if policy.example:
        asked = _user_message(policy, _EXAMPLE_CODE, _EXAMPLE_UPDATE, "Close the file.", _EXAMPLE_MERGED)
        answer = answer_start(policy) + expected_answer(policy, _EXAMPLE_CODE, _EXAMPLE_MERGED)
        chat += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    chat.append({"role": "user", "content": _user_message(policy, code, update, instruction, candidate, fence)})
    return chat


def answer_start(policy: Policy, fence: str = FENCE) -> str:
    """The given start of the answer, which the model continues."""
    return (f"{fence}\n" if policy.opened else "") + (f"{_SEARCH}\n" if policy.blocks else "")


def stop_strings(policy: Policy, fence: str = FENCE) -> tuple[str, ...]:
    """The strings that end the answer."""
    return (f"\n{fence}",) if policy.opened else ()


def expected_answer(policy: Policy, code: str, merged: str, fence: str = FENCE) -> str:
    """What the model writes after `answer_start` if it agrees with `merged`. This text is the draft."""
    text = merged.replace("\r\n", "\n").removeprefix(BOM)
    if policy.blocks:
        text = _blocks_between(code.replace("\r\n", "\n"), text).removeprefix(f"{_SEARCH}\n")
    return text.rstrip("\n") + "\n" + (fence if policy.opened else "")


def merged_text(policy: Policy, code: str, output: str, fence: str = FENCE, candidate: str | None = None) -> str:
    """The merged file that the model's answer contains, without its fence.

    Rows that the candidate (without one, the file) has too keep that text's bytes, including trailing white space and line
    ends; so does the end of the file. Blocks that do not match leave the file unchanged, which the checks then flag.
    """
    base = Lines.of(code if candidate is None or not candidate.strip() else candidate)
    text = output.replace("\r\n", "\n")
    text = text.removesuffix(fence) if policy.opened else _inside_fence(text)
    if policy.blocks:
        return _apply_or_keep(code, f"{_SEARCH}\n{text.rstrip()}\n")
    text = text.rstrip("\n").removeprefix(BOM)
    if not base.rows:
        return f"{text}\n"
    rows = text.split("\n")
    end = len(base.rows) - next((number for number, row in enumerate(reversed(base.rows)) if row.strip()), 0)
    if len(rows) > 1 and _FENCE_LINE.fullmatch(rows[-1].rstrip()) and rows[-1].strip() != base.rows[end - 1].strip():
        rows.pop()  # a closing fence without an opening one
    merged = Lines(base.bom, base.rows[:end], base.ends[:end]).matched_rows("\n".join(rows).rstrip("\n").split("\n"))
    return base.join([*merged, *range(end, len(base.rows))], bool(base.ends[-1]))


def _inside_fence(text: str) -> str:
    """The text between the first fence and the last, or after the only one; all of it if there is none."""
    lines = text.split("\n")
    fences = [number for number, line in enumerate(lines) if line.startswith(FENCE)]
    if not fences:
        return text
    return "\n".join(lines[fences[0] + 1 : fences[-1] if len(fences) > 1 else None])


def _apply_or_keep(code: str, blocks: str) -> str:
    """The file with the blocks applied, or unchanged if they do not match."""
    file = Lines.of(code)
    try:
        return file.text(apply_blocks(file, blocks))
    except InputError:
        return code


def _blocks_between(code: str, merged: str) -> str:
    """SEARCH/REPLACE blocks that turn `code` into `merged`, each with enough lines before it to match at its place first."""
    old, new = ([f"{row}\n" for row in text.removesuffix("\n").split("\n")] for text in (code, merged))
    pieces = []
    for group in difflib.SequenceMatcher(None, old, new, autojunk=False).get_grouped_opcodes(2):
        (_, first, _, start, _), (_, _, last, _, stop) = group[0], group[-1]
        while first > 0 and (
            not old[first].strip() or code.find("".join(old[first:last])) < sum(map(len, old[:first]))
        ):
            first, start = first - 1, start - 1
        search, replacement = "".join(old[first:last]), "".join(new[start:stop])
        pieces.append(f"{_SEARCH}\n{_with_line_feed(search)}=======\n{_with_line_feed(replacement)}>>>>>>> REPLACE\n")
    return "".join(pieces)


def _with_line_feed(text: str) -> str:
    return text if not text or text.endswith("\n") else text + "\n"


def morph_form(instruction: str, code: str, update: str) -> str:
    """An edit as Morph's apply prompt."""
    return f"<instruction>{instruction}</instruction>\n<code>{code}</code>\n<update>{update}</update>"


_INSTRUCTION = re.compile(r"\s*<instructions?>(.*?)</instructions?>\s*(?=<code>)", re.DOTALL)


def parse_morph(text: str) -> tuple[str, str, str]:
    """Parses Morph's apply prompt into (instruction, code, update). The instruction may be absent.

    Tags inside code or update stay text: the code ends at the last `</code>` that an `<update>` follows. Raises InputError if
    code or update is missing.
    """
    found = _INSTRUCTION.match(text)
    instruction = found[1].strip() if found else ""
    rest = text[found.end() :] if found else text.lstrip()
    parts = re.fullmatch(r"<code>(.*)</code>\s*<update>(.*)</update>\s*", rest, re.DOTALL)
    if parts is None:
        raise InputError("the prompt must be <instruction>…</instruction><code>…</code><update>…</update>")
    return instruction, parts[1], parts[2]


def with_warnings(instruction: str, code: str, merge: Merge) -> str:
    """The instruction, followed by a candidate's warnings, the lines it deletes, and the diff to its alternative."""
    if not merge.warnings:
        return instruction
    parts = [instruction] if instruction else []
    parts.append("The tool was not sure: " + "; ".join(merge.warnings[:_MAX_WARNINGS]) + ".")
    deleted = [row for row, stays in zip(Lines.of(code).rows, merge.kept, strict=True) if row.strip() and not stays]
    if deleted:
        parts += ["It took these lines out of the file:", *deleted[:_MAX_LINES]]
    if merge.alternative is not None:
        rows, others = Lines.of(merge.text).rows, Lines.of(merge.alternative.text).rows
        changes = list(difflib.unified_diff(rows, others, lineterm="", n=1))[2:]
        parts += ["The update may also mean this change to the merged file:", *changes[:_MAX_LINES]]
    return "\n".join(parts)


def _user_message(policy: Policy, code: str, update: str, instruction: str, candidate: str, fence: str = "") -> str:
    """The policy's template, filled in."""
    return policy.template.format(
        **shown_texts(policy, code, update, candidate),
        instruction=f"What the update does: {instruction}\n" if instruction else "",
        fence=fence or fence_for(code, update, candidate),
    )
