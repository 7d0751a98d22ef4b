"""The name in a line of code, from its text alone: of the definition that begins there, or of the key that it assigns."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

Name = tuple[str, str]  # of a definition: (kind, name)
# of decorators and comments, which belong to the definition below
DEFINITION_PREFIXES = ("@", "#", "//", "/*", "*", "*/")

_MODIFIERS = (
    r"(?:(?:export|default|declare|public|private|protected|internal|static|final|sealed|abstract|override|virtual|open"
    r"|async|unsafe|extern|partial|data|inline|const|local|pub(?:\([^)]*\))?)\s+)*"
)
_KINDS = (
    "def", "class", "function", "fn", "func", "fun", "interface", "struct", "enum", "trait", "type", "module", "namespace",
    "protocol", "extension", "object", "record", "defmodule", "defp",
)  # fmt: skip
_KEYWORD = re.compile(
    rf"^\s*{_MODIFIERS}({'|'.join(_KINDS)})\s+\*?(\([^)]*\)\s*)?([A-Za-z_$][\w$]*(?:(?:\.|::?)[A-Za-z_$][\w$]*)*[?!]?)"
    r"(?=\s*(?:[({:<=;\[!,]|$|(?:extends|implements|struct|interface|for|where|do|is|as|returns)\b))"
)
_IMPL = re.compile(r"^\s*(?:unsafe\s+)?impl\b\s*(.*?)\s*(?:\{|\bwhere\b|$)")
_ACCESSOR = re.compile(rf"^\s*{_MODIFIERS}([gs]et)\s+(#?[\w$]+)\s*\(")
_METHOD = re.compile(rf"^\s+{_MODIFIERS}\*?\s*(#?[A-Za-z_$][\w$]*)\s*(?:<[^>()]*>)?\([^;]*\)[^;()]*\{{$")
_TYPED_FUNCTION = re.compile(
    rf"^\s*{_MODIFIERS}(?:[\w:<>,\[\]*&?.]+\s+)+[*&]?(~?[A-Za-z_][\w:]*)\s*\([^;={{}}]*\)[^;=(){{}}]*\{{?$"
)
_FUNCTION_VALUE = re.compile(
    rf"^\s*{_MODIFIERS}(?:const|let|var|val)\s+(\w+)\b[^=]*=\s*(?:async\b\s*)?(?:function\b|\w+\s*=>|\(.*=>|.*[{{(\[]$)"
)
_CALL_WITH_TITLE = re.compile(r"^\s*(?:await\s+)?([A-Za-z_$][\w$.:]*[!?]?)(?:\s*\(\s*|\s+)(([\"'`]).*)$")
_STRING = re.compile(r"\s*([\"'`])((?:\\.|(?!\1)[^\\])*)\1")
_SYMBOL = re.compile(r"^\s*([a-z_]+)\s+(:\w+)\b.*\bdo\b")
_SQL = re.compile(
    r"^\s*create\s+(?:or\s+replace\s+)?(?:(?:temp|temporary|unique|materialized)\s+)*"
    r"(table|index|view|function|procedure|trigger|type|schema)\s+(?:if\s+not\s+exists\s+)?([\w.\"`\[\]]+)",
    re.IGNORECASE,
)
_BLOCK = re.compile(r"^\s*([^{}]*[^{}\s])\s*\{$")
_STATEMENTS = {
    "if", "for", "while", "switch", "catch", "with", "return", "else", "elif", "try", "do", "loop", "match", "finally", "new",
    "throw", "await", "yield", "case", "default", "foreach", "unless", "until", "not", "and", "or", "assert", "raise", "del",
    "print", "echo", "elsif", "except", "when", "guard", "defer", "go", "select", "using", "lock", "in", "import", "from",
}  # fmt: skip
_FIRST_WORDS = {
    *_KINDS, "export", "default", "declare", "public", "private", "protected", "internal", "static", "final", "sealed",
    "abstract", "override", "virtual", "open", "async", "unsafe", "extern", "partial", "data", "inline", "const", "local",
    "pub", "impl", "let", "var", "val", "get", "set", "create",
}  # fmt: skip
_BLOCK_OPENINGS = ("{", "(", "[", "=>", "do", "->", ",", "|")
_ANONYMOUS = re.compile(r"=>|[(=]$|\)\s*$")
_ACCESS = re.compile(r"^\s*(?:public|private|protected|internal|static|virtual|override)\b")
_KEY = re.compile(
    r"^\s*(?:-\s+)?(?:(?:export|const|let|var|val|static|public|private|protected|final|readonly|pub|mut|local|my|ENV|ARG)\s+)*"
    r"([\"']?[@$]?[\w$][\w$.\-/]*[\"']?)(\s*:\s*[^=:]+?)?\s*(?::=|={1,2}(?![=>])|~=|>=|<=|:(?!:|//))"
)
_PARAMETERS = re.compile(r"\((.*)\)")
DEFINITION_KINDS = {
    *_KINDS,
    "impl",
    "get",
    "set",
    "const",
    "method",
    "block",
}  # kinds of code definitions; other kinds have a title (tests)
_MACRO = re.compile(r"^\s*(\w+!)\s*[({\[]\s*(\w+)\s*[,;]")  # a Rust macro that defines a name
_SHELL = re.compile(r"^\s*([A-Za-z_][\w-]*)\s*\(\)\s*\{?$")
_MAX_LINE = 400  # bounds time: longer lines are not searched for a name
_PARAMETER_LABEL = re.compile(r"[(,]\s*(\w+) \w+:")  # Swift overloads functions by their parameter labels
_QUALIFYING_DECORATOR = re.compile(r"^\s*@[\w.]*\b(setter|getter|deleter|overload|register|when|dispatch)\b")
_SIGNATURE_DECORATORS = {
    "overload",
    "register",
    "when",
    "dispatch",
}  # decorators of functions that share a name and differ in signature


def _may_define(words: Sequence[str]) -> bool:
    """A cheap test that rules out most lines: whether a line of these words can begin a definition."""
    return bool(words) and (words[0].partition("(")[0].lower() in _FIRST_WORDS or words[-1].endswith(_BLOCK_OPENINGS))


@lru_cache(maxsize=1 << 16)
def defined_name(line: str) -> Name | None:
    """The kind and name of the definition that this line begins; None where it begins none that has a name."""
    words = line.split(None, 1)
    if not _may_define(words) or len(line) > _MAX_LINE:
        return None
    text = line.strip()
    if text[0] in "@/*)]}<" or (text[0] == "#" and not text.endswith("{")):
        return None
    if re.split(r"\W", text, maxsplit=1)[0] in _STATEMENTS:
        return None
    if found := _KEYWORD.match(line):
        receiver = re.sub(r"^\(\s*(?:\w+\s+)?|[\s)]+$", "", found[2]) if found[2] else ""
        name = f"{receiver.lstrip('*')}.{found[3]}" if receiver else found[3]
        labels = _PARAMETER_LABEL.findall(line[found.end() :]) if found[1] == "func" and not receiver else []
        return found[1], name + "".join(f"/{label}" for label in labels)
    if found := _IMPL.match(line):
        return "impl", " ".join(found[1].split())
    if found := _ACCESSOR.match(line):
        return found[1], found[2]
    if found := _SQL.match(line):
        return found[1].lower(), found[2].lower()
    opens = text.endswith(_BLOCK_OPENINGS)
    if opens and (found := _CALL_WITH_TITLE.match(line)) and (title := _leading_strings(found[2])):
        return found[1], title
    if opens and (found := _MACRO.match(line)):
        return found[1], found[2]
    if opens and (found := _SHELL.match(line)) and found[1] not in _STATEMENTS:
        return "method", found[1]
    if opens and (found := _SYMBOL.match(line)):
        return found[1], found[2]
    if found := _FUNCTION_VALUE.match(line):
        return "const", found[1]
    if "=>" not in text:
        found = _METHOD.match(line) or (_TYPED_FUNCTION.match(line) if opens or _ACCESS.match(line) else None)
        if found and found[1] not in _STATEMENTS:
            return "method", found[1]
    if (found := _BLOCK.match(line)) and not _ANONYMOUS.search(found[1]):
        return "block", " ".join(found[1].split())
    return None


def _leading_strings(text: str) -> str:
    """The string literals that an argument list begins with, joined by NUL: a test's title."""
    titles = []
    reached = 0
    while found := _STRING.match(text, reached):
        titles.append(found[2])
        reached = found.end()
    return "\0".join(titles)


def names_of(rows: Sequence[str]) -> list[Name | None]:
    """`defined_name` of each row. Functions that only a decorator distinguishes (setters, overloads) get distinct names."""
    names = [defined_name(row) for row in rows]
    for number, name in enumerate(names):
        if name is None or name[0] != "def":
            continue
        for above in range(number - 1, -1, -1):
            if not rows[above].lstrip().startswith("@"):
                break
            if found := _QUALIFYING_DECORATOR.match(rows[above]):
                signature = "".join(_PARAMETERS.findall(rows[number])) if found[1] in _SIGNATURE_DECORATORS else ""
                names[number] = name[0], f"{name[1]}.{found[1]}{signature}"
                break
    return names


def assigned_key(line: str) -> str | None:
    """The key that a line assigns: `version` in `version: 1`, `version = 1` and `"version": 1,`; None without an assignment."""
    found = _KEY.match(" ".join(line[:_MAX_LINE].split()))
    return found[1].strip("\"'") if found else None
