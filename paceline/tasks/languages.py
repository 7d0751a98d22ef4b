"""Grammars of languages, by the names of their files, and what they say of a text."""

from __future__ import annotations

import ast
import importlib
import re
import threading
import warnings
from functools import cache
from pathlib import PurePath

import tree_sitter

# a grammar is the package tree_sitter_NAME, and its function where it has several
_GRAMMARS = {
    ".py": "python", ".pyi": "python", ".js": "javascript", ".jsx": "javascript", ".mjs": "javascript",
    ".cjs": "javascript", ".ts": "typescript:language_typescript", ".mts": "typescript:language_typescript",
    ".tsx": "typescript:language_tsx", ".go": "go", ".rs": "rust", ".java": "java", ".c": "c", ".h": "c", ".cc": "cpp",
    ".cpp": "cpp", ".hpp": "cpp", ".cs": "c_sharp", ".json": "json", ".jsonc": "json", ".ipynb": "json", ".html": "html",
    ".css": "css", ".rb": "ruby", ".sh": "bash", ".php": "php:language_php", ".yaml": "yaml", ".yml": "yaml",
    ".toml": "toml", ".lua": "lua",
}  # fmt: skip
# what tells a language by its lines; the first with the most wins
_SIGNS = {
    ".py": re.compile(
        r"^[ \t]*(?:(?:async )?def \w+\(|class \w+.*:$|from [\w.]+ import |import \w|elif .*:$|except\b.*:$)", re.M
    ),
    ".tsx": re.compile(r"^[ \t]*(?:export |const \w+ = |(?:async )?function \w|import .* from |interface \w+ \{)", re.M),
    ".go": re.compile(r"^(?:func |package \w|type \w+ (?:struct|interface))", re.M),
    ".rs": re.compile(r"^[ \t]*(?:pub (?:fn|struct|enum|mod) |fn \w|use \w+::|impl\b)", re.M),
    ".java": re.compile(r"^[ \t]*(?:(?:public|private|protected) .*[{;]$|import [\w.]+;$|package [\w.]+;$)", re.M),
    ".cpp": re.compile(r"^(?:#include |namespace \w|template ?<|(?:static )?[\w:]+ \*?\w+\(.*\) ?\{$)", re.M),
}  # fmt: skip
_LEAST_SIGNS = 3

_WARNINGS = threading.Lock()


def suffix_of(path: str | None, text: str) -> str:
    """The suffix of a file's name, as in ".py"; without a name that of the language its lines look like, or ""."""
    return guess(text) if path is None else PurePath(path).suffix.lower()


def guess(text: str) -> str:
    """The suffix of files of the language that most lines look like; "" where few do."""
    counts = {suffix: len(signs.findall(text)) for suffix, signs in _SIGNS.items()}
    best = max(counts, key=lambda suffix: counts[suffix])
    return best if counts[best] >= _LEAST_SIGNS else ""


def num_errors(text: str, suffix: str) -> int | None:
    """How many places of a text do not parse; None where no grammar is known for the suffix."""
    parser = _parser(suffix)
    if parser is None:
        return None
    root = parser.parse(text.encode("utf-8", "surrogatepass")).root_node
    if not root.has_error:
        return int(suffix in (".py", ".pyi") and _python_refuses(text))
    found = 0
    nodes = [root]
    while nodes:
        node = nodes.pop()
        found += node.is_error or node.is_missing
        nodes += [child for child in node.children if child.has_error or child.is_missing]
    return max(1, found)


def _python_refuses(text: str) -> bool:
    """Whether Python's own parser, which is stricter, takes the text for wrong; not where it is too deep for it."""
    try:
        with _WARNINGS, warnings.catch_warnings(action="ignore"):  # which changes what all threads see
            compile(text, "file", "exec", ast.PyCF_ONLY_AST)
    except SyntaxError:
        return True
    except (ValueError, RecursionError, MemoryError):
        return False
    return False


def tree_of(text: str, suffix: str) -> list[tuple[int, str, bytes]] | None:
    """The nodes of a text's syntax tree, comments included, with depth, type and, of leaves, text; None without grammar."""
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
    """The grammar of the files whose names end so, as in ".py"; None where none is known."""
    if suffix not in _GRAMMARS:
        return None
    module, _, function = _GRAMMARS[suffix].partition(":")
    language = getattr(importlib.import_module(f"tree_sitter_{module}"), function or "language")
    return tree_sitter.Language(language())
