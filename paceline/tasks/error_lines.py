"""Finds the lines in which logs, compilers, tests and interpreters report an error: messages, what they point to, frames.

A line is judged by its shape. Words alone are not enough: code, counts of 0 and log lines at a low level are full of "error".
The patterns are written from real outputs (tests/tasks/test_error_lines.py).
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Sequence

MESSAGE, POINTED, QUOTED, FRAME, REPEATED = 5.0, 4.0, 3.0, 2.0, 1.0  # the greatest is kept first
_MAX_SIMILAR = 3  # bounds output: more messages than this that differ in numbers only are repeats

# every message and every frame holds one of these; str.find is many times as fast as a pattern
_SUBSTRINGS = (
    *("rror", "ERR", "ailed", "ailure", "AIL", "xception", "EXCEPTION", "anic", "ANIC", "atal", "ATAL", "CRIT", "SEVERE"),
    *("egmentation", "SIG", "ut of memory", "Killed", "bort", "ssertion", "nterrupt", "aused by", "uppressed:"),
    *("xit code", "xit status", "xited", "xit_code", "xitCode", "eturncode", "eturn code", "not found", "o such file"),
    *("ission denied", "ndefined", "annot find", ".go:", "\nE", "not ok ", "✕ ", "✗ ", "✖ ", "× ", "● ", "____ "),
    *("Traceback (", 'File "', "  at ", "\tat ", " more", "goroutine ", "backtrace:", "above exception"),
)  # fmt: skip
# what may precede a message: a time, a level in brackets, the name of a container or program
_LINE_PREFIX = (
    r"(?:[\d\s:.,TZ/+\[\]-]{0,50}\d[:.,/-]\d[\d:.,TZ/+\]-]{0,50}\s+|[\w.-]+\s*\|\s|[|+]\s+|>\s)?"
    r"(?:[\w.+/\\-]+(?:\[\d+\]|\([\d,]+\)|(?::\d+){1,2})?:\s)*"
)
# a line number before the line, as in the output of grep, cat -n and agents' tools
_STRONG_START = re.compile(
    _LINE_PREFIX
    + r"""(?:
    (?:(?:fatal|internal|compile|compiler|syntax|link(?:er)?|type|runtime)\ )*error
        (?:\[[\w:-]+\]|\ [A-Z]+-?\d+)?:\ +(?:\S.*)?[^;{,\s]\s*$
    |(?:PHP\ )?(?:fatal|parse)(?:\ error)?:\ +\S|assertion\ (?:.*\ )?failed\b
    |panic:\ |thread\ '[^']*'\ (?:\(\d+\)\ )?panicked\ at|runtime\ error:
    |npm\ (?:err!|error\b)|\S*ERR_PNPM|error\ command\ failed
    |\*\*\*\ .*\berror\ \d+|make(?:\[\d+\])?:\ \*\*\*
    )""",
    re.IGNORECASE | re.VERBOSE,
)
_STRONG_CASED = re.compile(
    _LINE_PREFIX
    + r"""(?:
    (?:(?:Uncaught|Unhandled|[Cc]aused\ by:|Suppressed:|Exception\ in\ thread\ "[^"]*"|Unhandled\ exception[.:]?
        |exception:?|Unhandled\ Rejection:?)\s+)*
        (?:[\w$]+(?:\.|::))*(?:[A-Z]\w*)?(?:Error|Exception|Interrupt)(?:\ \[\w+\])?(?::\s*(?:\S.*)?[^;{,\s]\s*$)
    |\s*(?:Caused\ by|Suppressed):\ |Exception\ in\ thread\ |Unhandled\ [Ee]xception|Uncaught\ [Ee]xception
    |FAILED(?:\ |$)|FAIL[\ :\t]|\s*---\ FAIL:|not\ ok\ \d|\s*[✕✗✖×]\ \S|\s*●\ (?:.+\ ›\ |Test\ suite\ failed)
    |E\ {2,}\S|[EF][01]\d{3}\ \d\d:\d\d:\d\d
    |\S+\.go:\d+:\d+:\ \S|\s+\w+_test\.go:\d+:\ \S
    |BUILD\ FAIL|\*\ What\ went\ wrong|Killed\s*$|Aborted\b|KeyboardInterrupt\s*$
    |Segmentation\ fault|error:\ could\ not
    )""",
    re.VERBOSE,
)
_STRONG_WITHIN = re.compile(
    r"""
    :\ (?:fatal\ )?error(?:\ [A-Z]+\d+)?:\ |\ -\ error\ TS\d+:|panicked\ at\ |^\s+\d+:\d+\s+error\s
    |:\ (?:No\ such\ file\ or\ directory|Permission\ denied|command\ not\ found)\s*$|(?:command\ not\ found)\s*$
    |\.{3}\s?(?:FAILED|FAIL|ERROR)\b|::\S+\ (?:FAILED|ERROR)\b|BUILD\ FAILURE|undefined\ reference\ to
    |[Cc]annot\ find\ (?:module|symbol)|Module\ not\ found|^\S+\.\w+:\d+:(?:\d+:)?(?:in\ .*)?\ .*Error\)?\s*$|\(core\ dumped\)
    |\b(?:level|lvl|severity)"?\s?[=:]\s?"?(?:error|fatal|crit(?:ical)?|panic|alert|emerg(?:ency)?)"?[\s,}]+\S
    |\w\.(?:ERROR|CRITICAL|ALERT|EMERGENCY):\ |\bAssertion\ .*\ failed\b
    """,
    re.IGNORECASE | re.VERBOSE,
)
_WEAK = re.compile(
    r"""
    (?<![\w.$"'/=-])(?:ERROR|FATAL|CRITICAL|SEVERE|PANIC|EMERG|EMERGENCY|FAILED|FAILURE|FAIL|EXCEPTION|ABORTED)(?![\w(="'/-]|\.\w)
    |(?i:\[(?:error|fatal|critical|severe|panic|fail|failed|crit|emerg|alert)\])
    |(?i:\bfailed\ (?:to\ \w|with\b|at\b|due\b|after\b|because\b|:)|\bfailed[:!.]?\s*$)
    |(?i:\bexit(?:ed)?(?:\ with)?(?:\ \w+)?\ (?:code|status)\W{1,3}-?[1-9]|\bexited\ with\ [1-9])
    |(?i:<?\b(?:exit_?code|return\ ?code|returncode)\b(?:>|\W{1,3})-?[1-9])
    |(?i:segmentation\ fault|\bbus\ error\b|SIGSEGV|SIGABRT|OOMKilled|out\ of\ memory|kernel\ panic)
    |(?i:^\W*error\ (?!handling|logging|reporting|checking|message)
        (?:\w+ing|in|while|at|during|from|response|occurred)\b(?:\ \S+){2})
    |(?i:\ban?\ (?:\w+\ )?error\ (?:has\ )?occurred\b|unhandled\ exception|uncaught\ exception)
    """,
    re.VERBOSE,
)  # fmt: skip
_POSITIVE_COUNT = re.compile(
    r"(?i)(?<![\w.])[1-9]\d* (?:failed|failures?|errors?)\b|\b(?:failures?|failed|errors?)[:=]\s*[1-9]"
)
_ZERO_COUNT = re.compile(
    r"(?i)\b(?:0|no|zero|without) (?:\w+ )?(?:errors?|fail(?:ed|ures?)?|exceptions?)\b"
    r"|\b(?:\w+_)?(?:errors?|fail(?:ed|ures?)?|exceptions?)(?:_\w+)?[\"']?\s?[=:(]?\s?(?:0\b(?!x)|none\b|null\b|\[\]|\{\}|false\b|nil\b|\"\"|'')"
)
_LOW_LEVEL = re.compile(
    r"(?:^|[\s\[|<(\"'=:])(?:INFO|DEBUG|TRACE|NOTICE|VERBOSE|WARN|WARNING)(?=[\s\]|>):,\"']|$)"
    r"|^\W*(?:info|debug|trace|notice|warn|warning)\b[\]:]|: (?:warning|note|info): "
    r"|(?i:\b(?:level|lvl|severity)\"?\s?[=:]\s?\"?(?:info|debug|trace|notice|warn)|\[(?:info|debug|trace|notice|warn|warning)\])"
    r"|^[IWD][01]\d{3} \d\d:"
)
_NUMBERED_LINE = re.compile(r"\s*(?:[\w./-]+[:-])?\d+[:→|\t-]\s?")
_CODE_LINE = re.compile(
    r"""\s*(?:
    (?:(?:async\ )?def|class|elif|while|return|raise|throw|except|catch|const|let|var|func|fn|pub|private|public
        |protected|@\w+)\b
    |(?:if|for|case|import|from|assert|print|log|logger|logging|console|self|this|\}\s*else)(?:[.(]|\ .*[:;{(]\s*$)
    |\}|\#(?!\d)|//|/\*|\*\ |<!--|["'`]|\.\.\ |[-+]\s*["'\#}]
    |[\w.\[\]"']+\s*(?:[:+-]?=|=>)\s
    |[\w.]+\(.*\)[:;,]?\s*$
    |.*[;{,(\[]\s*$
    )""",
    re.VERBOSE,
)  # fmt: skip
_MAX_LINE = 400  # bounds time: characters of a line that are examined
_COMMON_CODE = re.compile(  # the commonest code that mentions errors, rejected first to save time
    r"\s*(?:raise |except[ :]|throw |def |async def |assert |import |from |return [^c]|if |with |self\.|>>> "
    r"|[\"'`]|//|/\*|\s\* |<returncode>0)"
)
_MAX_WORDS = 30  # a line of more words is prose; not tuned
_FRAME = re.compile(
    r"\s+at (?:(?:async |new )?[^\s()]+(?: \[as [^\]]+\])? ?\([^()]*(?:\([^()]*\)[^()]*)?\)|.*:line \d+|\S+:\d+(?::\d+)?\)?)"
)
_CHAIN_LINK = re.compile(r"[\s|]*(?:During handling of|The) (?:the )?above exception\b|_{3,} .* _{3,}\s*$")
_OMITTED_FRAMES = re.compile(r"\s*\.\.\. \d+ (?:more|common frames omitted|lines matching)")
_PYTHON_FRAME = re.compile(r"([\s|+]*)File \"[^\"]*\", line \d+")
_GOROUTINE = re.compile(r"goroutine \d+ .*\]:\s*$")
_GO_CALL = re.compile(r"\t\S|created by |\S+\(.*\)\s*$")
_NUMBERED_FRAME = re.compile(r"\s+\d+: +\S|\s+at \S")
_TRACEBACK = re.compile(r".*Traceback \(most recent call last\)")
_EXCEPTION_NAME = re.compile(r"[\s|]*[\w.]+(?::|\s*$)")
_CARETS = re.compile(r"(?=.*[\^~])[\s|\dE>]*[\^~][\^~\s|-]*(?:[a-z ].*)?$")
_POINTER = re.compile(r"\s*(?:-->|:::|╭─\[|┌─)\s*\S|\s+\S+:\d+(?::\d+)?\)?\s*$")
_DETAIL = re.compile(
    r"\s*\d*\s*\||\s*>?\s*\d+ +[|│]|\s+= (?:note|help)|(?:note|help): |\S+:\d+:\d+: note: "
    r"|\s*(?:left|right): |\s*(?:- |\+ )?(?:Expected|Received|expected|received|actual|got|want|wanted)\b.*:|\s+expect\("
    r"|\s+(?:requires|required|found|symbol|location|reason|detail|hint|\[cause\]): "
    r"|\[signal |DETAIL: |HINT: |LINE \d+: |\.\.\.$"
)  # fmt: skip
_TIMESTAMP = re.compile(r"^[\d\s:.,TZ/+\[\]-]*\d[\d:.,TZ/+\]-]*\s+")
_DIGITS = re.compile(r"\d+|0x[0-9a-f]+")


def error_lines(lines: Sequence[str]) -> dict[int, float]:
    """The rows (from 0) that report an error, each with its class: MESSAGE, POINTED, QUOTED, FRAME or REPEATED."""
    rows = _candidate_rows(lines)
    found: dict[int, float] = {}
    if rows:
        lines = [line[:_MAX_LINE] for line in lines]
        found = {row: MESSAGE for row in rows if _is_message(lines[row])}
        _mark_stack_frames(lines, rows, found)
        for row in sorted(found):
            if found[row] == MESSAGE:
                _mark_context(lines, row, found)
        _demote_repeats(lines, found)
    return found


def _candidate_rows(lines: Sequence[str]) -> list[int]:
    """The rows that hold one of the substrings, in order."""
    text = "\n" + "".join(lines)
    # where each row begins in the text, and where the text ends
    ends = list(itertools.accumulate(map(len, lines), initial=1))
    rows: set[int] = set()
    for substring in _SUBSTRINGS:
        position = text.find(substring)
        while position >= 0:
            row = bisect.bisect_right(ends, position + substring.startswith("\n")) - 1
            rows.add(row)
            position = text.find(substring, max(position + 1, ends[row + 1] - 1))
    return sorted(rows)


def _is_message(line: str) -> bool:
    """Whether a line is an error message, judged by the line alone."""
    if _COMMON_CODE.match(line):
        return False
    if _POSITIVE_COUNT.search(line) and not _CODE_LINE.match(line) and not _LOW_LEVEL.search(line[:120]):
        return True
    if _ZERO_COUNT.search(line):
        return False
    if _STRONG_START.match(line) or _STRONG_CASED.match(line) or _STRONG_WITHIN.search(line):
        return "BUILD FAIL" in line or not _LOW_LEVEL.search(line[:120])
    weak = _WEAK.search(line)
    if weak is None or line.count(" ", len(line) - len(line.lstrip())) >= _MAX_WORDS:
        return False
    if _LOW_LEVEL.search(line[: weak.start()]):
        return False
    numbered = _NUMBERED_LINE.match(line)
    return not _CODE_LINE.match(line[numbered.end() :] if numbered else line)


def _mark_stack_frames(lines: Sequence[str], rows: list[int], found: dict[int, float]) -> None:
    """Marks stack frames among the candidate rows, and the messages above or below each stack."""
    end = -1  # the end of the last stack
    for row in rows:
        line = lines[row]
        if row < end:
            continue
        if _TRACEBACK.match(line) or _CHAIN_LINK.match(line):
            found.setdefault(row, QUOTED)
        elif _PYTHON_FRAME.match(line):
            end = _mark_python_frames(lines, row, found)
        elif _FRAME.match(line) or _OMITTED_FRAMES.match(line):
            frames = list(itertools.takewhile(lambda each: _is_frame(lines[each]), range(row, len(lines))))
            end = row + len(frames)
            _mark_frames(found, [[each] for each in frames])
            if lines[end - 1].rstrip().endswith("{"):  # Node prints the error's other properties in braces
                close = next(
                    (each for each in range(end, min(end + 12, len(lines))) if lines[each].startswith("}")), end - 1
                )
                found.update((each, QUOTED) for each in range(end, close + 1))
            if row and row - 1 not in found and lines[row - 1].strip() and not _DETAIL.match(lines[row - 1]):
                found[row - 1] = MESSAGE
        elif _GOROUTINE.match(line):
            end = next((each for each in range(row + 1, len(lines)) if not _GO_CALL.match(lines[each])), len(lines))
            found[row] = QUOTED
            _mark_frames(found, [list(range(each, min(each + 2, end))) for each in range(row + 1, end, 2)])
        elif line.strip() == "stack backtrace:":
            end = row + 1
            while end < len(lines) and _NUMBERED_FRAME.match(lines[end]):
                end += 1
            found[row] = QUOTED
            starts = [each for each in range(row + 1, end) if not lines[each].lstrip().startswith("at ")]
            _mark_frames(found, [list(range(*pair)) for pair in itertools.pairwise([*starts, end])])


def _is_frame(line: str) -> bool:
    return _FRAME.match(line) is not None or _OMITTED_FRAMES.match(line) is not None


def _mark_frames(found: dict[int, float], frames: list[list[int]]) -> None:
    """Marks the frames of a stack. The first and the last frame rank as POINTED, the others as FRAME."""
    for position, frame in enumerate(frames):
        for row in frame:
            found[row] = max(found.get(row, 0.0), POINTED if position in (0, len(frames) - 1) else FRAME)


def _mark_python_frames(lines: Sequence[str], row: int, found: dict[int, float]) -> int:
    """Marks a Python stack, each frame with its source lines, and the message below it. Returns the stack's end."""
    frames: list[list[int]] = []
    end = row
    while end < len(lines) and (head := _PYTHON_FRAME.match(lines[end])):
        frame = [end]
        end += 1
        while (
            end < len(lines)
            and len(frame) < 5
            and lines[end].startswith(head[1] + " ")
            and not _PYTHON_FRAME.match(lines[end])
        ):
            frame.append(end)
            end += 1
        frames.append(frame)
        if end < len(lines) and lines[end].lstrip().startswith("[Previous line repeated"):
            frame.append(end)
            end += 1
    _mark_frames(found, frames)
    if end < len(lines) and lines[end].strip() and _EXCEPTION_NAME.match(lines[end]):
        found[end] = MESSAGE
    return end


def _mark_context(lines: Sequence[str], row: int, found: dict[int, float]) -> None:
    """Marks what a message points to: the lines below it, and above it the source that pytest and Node print."""
    blank = 0
    for each in range(row + 1, len(lines)):
        line = lines[each]
        if found.get(each) == MESSAGE:
            break
        if not line.strip():
            blank += 1
            if blank > 1:
                break
            continue
        if each in found:
            continue
        if _POINTER.match(line):
            found[each] = POINTED
        elif _DETAIL.match(line) or _CARETS.match(line) or any(map(_CARETS.match, lines[each + 1 : each + 3])):
            found[each] = QUOTED
        elif each == row + 1 and "panicked at" in lines[row]:
            found[each] = MESSAGE  # Rust prints the message on the next line
        else:
            break
        blank = 0
    if lines[row].startswith("E  ") and not lines[row - 1].startswith("E  "):
        for each in range(row - 1, max(-1, row - 16), -1):
            if lines[each].startswith("E  "):
                break
            if lines[each].startswith(">   "):
                found.update((between, POINTED) for between in range(each, row) if between not in found)
                break
    carets = next((each for each in range(row - 1, max(-1, row - 4), -1) if _CARETS.match(lines[each])), None)
    if carets is not None and carets not in found:
        for each in range(max(0, carets - 2), carets + 1):
            if lines[each].strip():
                found.setdefault(each, QUOTED)


def _demote_repeats(lines: Sequence[str], found: dict[int, float]) -> None:
    """Ranks messages that only repeat others with different numbers last, and removes repeated frames and quotations."""
    seen: dict[str, int] = {}
    for row in sorted(found):
        key, allowed = _TIMESTAMP.sub("", lines[row].strip()), 1
        if found[row] == MESSAGE:
            key, allowed = _DIGITS.sub("0", key), _MAX_SIMILAR
        else:
            # a frame or a row of carets is a repeat only together with the row below it
            key += "".join(lines[row + 1 : row + 2])
        seen[key] = seen.get(key, 0) + 1
        if seen[key] > allowed and allowed == _MAX_SIMILAR:
            found[row] = REPEATED
        elif seen[key] > allowed:
            del found[row]
