"""The outline of a text that is code or contains code: where its definitions and imports are. Uses tree-sitter."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import PurePath

import tree_sitter

from paceline.tasks.languages import grammar_for, guessed_suffix

_NUMBERED = re.compile(r"\s*\d+(?:[\t→|:]| {1,2}(?! ))")
_FENCE = re.compile(r"[ \t]*(?:```|~~~)[ \t]*([\w+#.-]*)$")
_FENCE_SUFFIXES = {
    "python": ".py", "py": ".py", "javascript": ".js", "js": ".js", "jsx": ".jsx", "typescript": ".ts", "ts": ".ts",
    "tsx": ".tsx", "go": ".go", "golang": ".go", "rust": ".rs", "rs": ".rs", "java": ".java", "c": ".c", "cpp": ".cpp",
    "c++": ".cpp", "ruby": ".rb", "rb": ".rb", "diff": "", "text": "",
}  # fmt: skip
_DEFINITION_NODE = re.compile(
    r"(?:function|generator_function|method|class|abstract_class|struct|interface|trait|impl|enum|mod|type|type_alias"
    r"|constructor|namespace)_(?:definition|declaration|item|specifier)|arrow_function|class|method|module|singleton_method"
)
_IMPORT_NODE = re.compile(
    r"import_(?:from_)?(?:statement|declaration)|use_declaration|preproc_include|future_import_statement"
)


@dataclass(frozen=True)
class DefinitionBlock:
    """A definition's rows, counted from 0: its first, the last one of its header, and its last."""

    start: int
    head: int
    end: int


@dataclass(frozen=True)
class Outline:
    """Definitions by their first row, outer ones first, and the rows of imports."""

    blocks: tuple[DefinitionBlock, ...] = ()
    imports: tuple[int, ...] = ()


def outline(lines: Sequence[str], name: str | None = None) -> Outline:
    """The outline of lines (with their ends). The language follows from `name`, from a Markdown fence, or from the lines.

    Line numbers before the lines, as agents' tools print them, are ignored. Empty for text that does not look like code.
    """
    plain = _without_numbers(lines)
    blocks: list[DefinitionBlock] = []
    imports: list[int] = []
    for start, end, suffix in _regions(plain, PurePath(name or "").suffix.lower()):
        grammar = grammar_for(suffix)
        if grammar is not None:
            _collect(grammar, "".join(plain[start:end]), start, blocks, imports)
    return Outline(tuple(sorted(blocks, key=lambda block: (block.start, -block.end))), tuple(imports))


def _without_numbers(lines: Sequence[str]) -> list[str]:
    """The lines without line numbers, if most lines begin with one."""
    found = [_NUMBERED.match(line) for line in lines]
    if sum(match is not None for match in found) * 2 < len(lines):
        return list(lines)
    return [line[match.end() :] if match else line for line, match in zip(lines, found, strict=True)]


def _regions(lines: list[str], suffix: str) -> list[tuple[int, int, str]]:
    """Ranges of rows that are code of one language, each with the suffix of that language's files."""
    if grammar_for(suffix) is not None:
        return [(0, len(lines), suffix)]
    regions = []
    opened: tuple[int, str] | None = None
    for row, line in enumerate(lines):
        found = _FENCE.match(line.rstrip()) if "```" in line or "~~~" in line else None
        if found and opened is None:
            opened = (row + 1, found[1].lower())
        elif found and opened is not None:
            regions.append((opened[0], row, opened[1]))
            opened = None
    regions = regions or [(0, len(lines), "")]
    known = [
        (start, end, _FENCE_SUFFIXES.get(word) or guessed_suffix("".join(lines[start:end])))
        for start, end, word in regions
    ]
    return [(start, end, suffix) for start, end, suffix in known if suffix]


def _collect(
    language: tree_sitter.Language, text: str, offset: int, blocks: list[DefinitionBlock], imports: list[int]
) -> None:
    """Appends the definitions and imports of a text that begins at row `offset`."""
    tree = tree_sitter.Parser(language).parse(text.encode("utf-8", "surrogatepass"))
    captures = tree_sitter.QueryCursor(_query(language)).captures(tree.root_node)
    for node in captures.get("definition", ()):
        body = node.child_by_field_name("body")
        start, end = node.start_point.row, _last_row(node)
        if end == start or node.parent is None:
            continue
        head = start
        if body is not None:
            braces = body.child_count > 0 and body.children[0].type == "{"
            head = max(start, body.start_point.row - (not braces))
        blocks.append(DefinitionBlock(offset + start, offset + min(head, end), offset + end))
    for node in captures.get("import", ()):
        imports += range(offset + node.start_point.row, offset + _last_row(node) + 1)


def _last_row(node: tree_sitter.Node) -> int:
    """The last row that a node covers. Some nodes include their line feed and so end at column 0 of the next row."""
    ends_before = node.end_point.column == 0 and node.end_point.row > node.start_point.row
    return node.end_point.row - ends_before


@cache
def _query(language: tree_sitter.Language) -> tree_sitter.Query:
    """A query that captures the definition nodes and import nodes which this grammar has."""
    numbers = [number for number in range(language.node_kind_count) if language.node_kind_is_named(number)]
    kinds = {language.node_kind_for_id(number) or "" for number in numbers if language.node_kind_is_visible(number)}
    wanted = [f"({kind}) @definition" for kind in sorted(kinds) if _DEFINITION_NODE.fullmatch(kind)]
    wanted += [f"({kind}) @import" for kind in sorted(kinds) if _IMPORT_NODE.fullmatch(kind)]
    return tree_sitter.Query(language, "\n".join(wanted))
