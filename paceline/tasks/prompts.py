"""How the model is asked to merge: policies as data, and Morph's prompt form."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from paceline.errors import ConfigError, InputError
from paceline.tasks.blocks import apply_blocks
from paceline.tasks.lines import BOM, Lines
from paceline.tasks.merge import Merge, strip_fence

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


_MOST = 3  # doubts that the model is told
_MOST_LINES = 40  # lines that go, and of another reading, that it is shown
FENCE = "```"
_FENCE_LINE = re.compile(r"^ {0,3}(`{3,})", re.MULTILINE)
_SEARCH = "<<<<<<< SEARCH"


@dataclass(frozen=True)
class Policy:
    """One way to ask. `template` takes code, update, instruction, candidate and the fence around each.

    `opened` starts the answer with a fence, so that the model writes code at once, and ends it at the closing one.
    With `blocks` the answer is SEARCH/REPLACE blocks, else the whole file. `margin` is in nats: a candidate token at
    most that much less likely than the model's first choice is taken instead, which is not lossless (0 is). With `rule`
    a candidate without a doubt is the answer, and the model is asked only which of two readings a doubtful edit has.
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
        """Whether the prompt shows the candidate."""
        return "{candidate}" in self.template


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
DEFAULT_POLICY = "auto"  # as exact as the better of rule and model, on every set: docs/apply.md


def policy_named(name: str) -> Policy:
    """The policy of that name. Raises ConfigError naming the nearest."""
    if name not in POLICIES:
        near = difflib.get_close_matches(name, POLICIES, n=1, cutoff=0.0)[0]
        raise ConfigError(f"there is no policy {name!r}; did you mean {near!r}? known: {', '.join(POLICIES)}")
    return POLICIES[name]


def fence_for(*texts: str) -> str:
    """A fence that no line of the texts can be taken for: three backticks, or one more than the longest such line."""
    fenced = [text for text in texts if FENCE in text]
    longest = max((len(found[1]) for text in fenced for found in _FENCE_LINE.finditer(text)), default=0)
    return "`" * max(len(FENCE), longest + 1)


def shown(policy: Policy, code: str, update: str, candidate: str) -> dict[str, str]:
    """What the policy shows, by its names in the template, each as it stands between two fences."""
    code, update, candidate = (text.removeprefix(BOM) for text in (code, strip_fence(update), candidate))
    texts = {"code": code.rstrip("\n"), "update": update.strip("\n"), "candidate": candidate.rstrip("\n")}
    return {name: text for name, text in texts.items() if f"{{{name}}}" in policy.template}


def messages(
    policy: Policy, code: str, update: str, instruction: str, candidate: str, fence: str = ""
) -> list[dict[str, str]]:
    """The chat up to the answer. The fence is one for these texts where none is given."""
    chat = [{"role": "system", "content": _SYSTEM}]
    if policy.example:
        asked = _fill(policy, _EXAMPLE_CODE, _EXAMPLE_UPDATE, "Close the file.", _EXAMPLE_MERGED)
        answer = opening(policy) + expected(policy, _EXAMPLE_CODE, _EXAMPLE_MERGED)
        chat += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    chat.append({"role": "user", "content": _fill(policy, code, update, instruction, candidate, fence)})
    return chat


def opening(policy: Policy, fence: str = FENCE) -> str:
    """The start of the answer, which the model continues."""
    return (f"{fence}\n" if policy.opened else "") + (f"{_SEARCH}\n" if policy.blocks else "")


def stops(policy: Policy, fence: str = FENCE) -> tuple[str, ...]:
    """The strings that end the answer."""
    return (f"\n{fence}",) if policy.opened else ()


def expected(policy: Policy, code: str, merged: str, fence: str = FENCE) -> str:
    """What the model writes after the opening if it agrees with `merged`: the draft."""
    text = merged.replace("\r\n", "\n").removeprefix(BOM)
    if policy.blocks:
        text = _blocks_of(code.replace("\r\n", "\n"), text).removeprefix(f"{_SEARCH}\n")
    return text.rstrip("\n") + "\n" + (fence if policy.opened else "")


def read(policy: Policy, code: str, output: str, fence: str = FENCE, candidate: str | None = None) -> str:
    """The merged file in the model's answer, out of its fence.

    Rows that the candidate (without one, the file) has keep its bytes, white space and line ends at their ends included;
    so does the end of the file. Blocks that do not fit the file leave it as it is, which the checks flag.
    """
    base = Lines.of(code if candidate is None or not candidate.strip() else candidate)
    text = output.replace("\r\n", "\n")
    text = text.removesuffix(fence) if policy.opened else _inside_fence(text)
    if policy.blocks:
        return _apply(code, f"{_SEARCH}\n{text.rstrip()}\n")
    text = text.rstrip("\n").removeprefix(BOM)
    if not base.rows:
        return f"{text}\n"
    rows = text.split("\n")
    end = len(base.rows) - next((number for number, row in enumerate(reversed(base.rows)) if row.strip()), 0)
    if len(rows) > 1 and _FENCE_LINE.fullmatch(rows[-1].rstrip()) and rows[-1].strip() != base.rows[end - 1].strip():
        rows.pop()  # a closing fence that closes nothing
    merged = Lines(base.bom, base.rows[:end], base.ends[:end]).matched("\n".join(rows).rstrip("\n").split("\n"))
    return base.join([*merged, *range(end, len(base.rows))], bool(base.ends[-1]))


def _inside_fence(text: str) -> str:
    """What stands between the first fence and the last, or after the only one; all of it where there is none."""
    lines = text.split("\n")
    fences = [number for number, line in enumerate(lines) if line.startswith(FENCE)]
    if not fences:
        return text
    return "\n".join(lines[fences[0] + 1 : fences[-1] if len(fences) > 1 else None])


def _apply(code: str, blocks: str) -> str:
    file = Lines.of(code)
    try:
        return file.text(apply_blocks(file, blocks))
    except InputError:
        return code


def _blocks_of(code: str, merged: str) -> str:
    """SEARCH/REPLACE blocks that make `merged` of `code`, each with lines around until nothing before it is like it."""
    old, new = ([f"{row}\n" for row in text.removesuffix("\n").split("\n")] for text in (code, merged))
    pieces = []
    for group in difflib.SequenceMatcher(None, old, new, autojunk=False).get_grouped_opcodes(2):
        (_, first, _, start, _), (_, _, last, _, stop) = group[0], group[-1]
        while first > 0 and (
            not old[first].strip() or code.find("".join(old[first:last])) < sum(map(len, old[:first]))
        ):
            first, start = first - 1, start - 1
        search, replacement = "".join(old[first:last]), "".join(new[start:stop])
        pieces.append(f"{_SEARCH}\n{_closed(search)}=======\n{_closed(replacement)}>>>>>>> REPLACE\n")
    return "".join(pieces)


def _closed(text: str) -> str:
    return text if not text or text.endswith("\n") else text + "\n"


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


def told(instruction: str, code: str, merge: Merge) -> str:
    """An instruction, and with it what is doubtful in a candidate: why, the lines that go, and the other reading."""
    if not merge.doubts:
        return instruction
    said = [instruction] if instruction else []
    said.append("The tool was not sure: " + "; ".join(merge.doubts[:_MOST]) + ".")
    gone = [row for row, stays in zip(Lines.of(code).rows, merge.kept, strict=True) if row.strip() and not stays]
    if gone:
        said += ["It took these lines out of the file:", *gone[:_MOST_LINES]]
    if merge.other is not None:
        rows, others = Lines.of(merge.text).rows, Lines.of(merge.other.text).rows
        changes = list(difflib.unified_diff(rows, others, lineterm="", n=1))[2:]
        said += ["The update may also mean this change to the merged file:", *changes[:_MOST_LINES]]
    return "\n".join(said)


def _fill(policy: Policy, code: str, update: str, instruction: str, candidate: str, fence: str = "") -> str:
    return policy.template.format(
        **shown(policy, code, update, candidate),
        instruction=f"What the update does: {instruction}\n" if instruction else "",
        fence=fence or fence_for(code, update, candidate),
    )
