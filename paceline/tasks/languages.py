"""Tree-sitter grammars by file suffix, and what they say about a text: its syntax errors and its tree."""

from __future__ import annotations

import ast
import importlib
import re
import threading
import warnings
from functools import cache
from pathlib import PurePath

import tree_sitter

# suffix -> NAME of the package tree_sitter_NAME, with ":function" if the package has several grammars
_GRAMMARS = {
    ".py": "python", ".pyi": "python", ".js": "javascript", ".jsx": "javascript", ".mjs": "javascript",
    ".cjs": "javascript", ".ts": "typescript:language_typescript", ".mts": "typescript:language_typescript",
    ".tsx": "typescript:language_tsx", ".go": "go", ".rs": "rust", ".java": "java", ".c": "c", ".h": "c", ".cc": "cpp",
    ".cpp": "cpp", ".hpp": "cpp", ".cs": "c_sharp", ".json": "json", ".jsonc": "json", ".ipynb": "json", ".html": "html",
    ".css": "css", ".rb": "ruby", ".sh": "bash", ".php": "php:language_php", ".yaml": "yaml", ".yml": "yaml",
    ".toml": "toml", ".lua": "lua",
}  # fmt: skip
# lines typical of a language; the language with the most of them wins, the first of equals
_TYPICAL_LINES = {
    ".py": re.compile(
        r"^[ \t]*(?:(?:async )?def \w+\(|class \w+.*:$|from [\w.]+ import |import \w|elif .*:$|except\b.*:$)", re.M
    ),
    ".tsx": re.compile(r"^[ \t]*(?:export |const \w+ = |(?:async )?function \w|import .* from |interface \w+ \{)", re.M),
    ".go": re.compile(r"^(?:func |package \w|type \w+ (?:struct|interface))", re.M),
    ".rs": re.compile(r"^[ \t]*(?:pub (?:fn|struct|enum|mod) |fn \w|use \w+::|impl\b)", re.M),
    ".java": re.compile(r"^[ \t]*(?:(?:public|private|protected) .*[{;]$|import [\w.]+;$|package [\w.]+;$)", re.M),
    ".cpp": re.compile(r"^(?:#include |namespace \w|template ?<|(?:static )?[\w:]+ \*?\w+\(.*\) ?\{$)", re.M),
}  # fmt: skip
_MIN_TYPICAL_LINES = 3  # fewer typical lines than this name no language; not tuned

_WARNINGS_LOCK = threading.Lock()


def suffix_of(path: str | None, text: str) -> str:
    """The lower-case suffix of a file's name, such as ".py"; without a name `guessed_suffix` of the text."""
    return guessed_suffix(text) if path is None else PurePath(path).suffix.lower()


def guessed_suffix(text: str) -> str:
    """The file suffix of the language that most lines are typical of; "" if too few are."""
    counts = {suffix: len(pattern.findall(text)) for suffix, pattern in _TYPICAL_LINES.items()}
    best = max(counts, key=lambda suffix: counts[suffix])
    return best if counts[best] >= _MIN_TYPICAL_LINES else ""


def num_errors(text: str, suffix: str) -> int | None:
    """The number of syntax errors in a text; None if no grammar is known for the suffix."""
    parser = _parser(suffix)
    if parser is None:
        return None
    root = parser.parse(text.encode("utf-8", "surrogatepass")).root_node
    if not root.has_error:
        return int(suffix in (".py", ".pyi") and _is_invalid_python(text))
    found = 0
    nodes = [root]
    while nodes:
        node = nodes.pop()
        found += node.is_error or node.is_missing
        nodes += [child for child in node.children if child.has_error or child.is_missing]
    return max(1, found)


def _is_invalid_python(text: str) -> bool:
    """Whether Python's own parser, which is stricter than the grammar, rejects the text. False if it is nested too deep."""
    try:
        with _WARNINGS_LOCK, warnings.catch_warnings(action="ignore"):  # the filter is global to all threads
            compile(text, "file", "exec", ast.PyCF_ONLY_AST)
    except SyntaxError:
        return True
    except (ValueError, RecursionError, MemoryError):
        return False
    return False


def tree_of(text: str, suffix: str) -> list[tuple[int, str, bytes]] | None:
    """The syntax tree's nodes in order, comments included: (depth, type, text of a leaf). None without a grammar."""
    parser = _parser(suffix)
    if parser is None:
        return None
    tree = []
    nodes = [(0, parser.parse(text.encode("utf-8", "surrogatepass")).root_node)]
    while nodes:
        depth, node = nodes.pop()
        children = node.children
        tree.append((depth, node.type, b"" if children else node.text or b""))
        nodes += [(depth + 1, child) for child in reversed(children)]
    return tree


@cache
def _parser(suffix: str) -> tree_sitter.Parser | None:
    grammar = grammar_for(suffix)
    return None if grammar is None else tree_sitter.Parser(grammar)


@cache
def grammar_for(suffix: str) -> tree_sitter.Language | None:
    """The grammar for files with this suffix, such as ".py"; None if none is known."""
    if suffix not in _GRAMMARS:
        return None
    module, _, function = _GRAMMARS[suffix].partition(":")
    language = getattr(importlib.import_module(f"tree_sitter_{module}"), function or "language")
    return tree_sitter.Language(language())
