"""Source text of permissively licensed packages: which may be used, and their functions and classes."""

from __future__ import annotations

import ast
import doctest
import email
import hashlib
import re
import textwrap
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message
from pathlib import Path, PurePosixPath

# benchmarks are made of these repositories, so no drafter learns from them
HELD_OUT_PACKAGES = frozenset({"requests", "rich", "flask"})
_VENDORED = {
    "_vendor",
    "vendor",
    "vendored",
    "_vendored",
    "third_party",
    "thirdparty",
    "externals",
    "extern",
    "_extern",
}
_PERMISSIVE = re.compile(
    r"\b(mit|mit-0|bsd|0bsd|bsd-\d-clause|apache|psf(-2\.0|l)?|python software foundation|isc|unlicense|cc0-1\.0|"
    r"public domain|hpnd|mit-cmu|zlib|bsl-1\.0|licenseref-biopython-license-agreement)\b",
    re.IGNORECASE,
)
_COPYLEFT = re.compile(r"gpl|gnu|mpl|mozilla|eupl|epl|cddl|copyleft|proprietary|sspl|cc-by|cecill", re.IGNORECASE)
_HEADING = re.compile(
    r"^(parameters?|args|arguments|attributes|returns?|yields?|raises|examples?|usage|notes?|see also|references|warns?|"
    r"warnings?|keyword arguments|other parameters|methods)\s*(:|::)?\s*$",
    re.IGNORECASE,
)
_FIELD = re.compile(r"^:(param|parameter|arg|type|returns?|rtype|raises?)\b[^:]*:")
_ROLE = re.compile(r":[a-z:]+:`~?([^`<]+?)(?:\s*<[^`>]*>)?`")
_DIRECTIVE = re.compile(r"^\s*\.\. [\w-]+::.*$", re.MULTILINE)
_LARGEST_FILE = 200_000  # bytes; larger files are mostly tables


@dataclass(frozen=True)
class Package:
    """A distribution found in a folder: a wheel, or one that is unpacked or installed there."""

    name: str
    version: str
    licence: str  # as the metadata names it
    refused: str  # the reason not to use it; empty where it may be used
    description: str  # of the metadata, usually the README
    root: Path  # the wheel, or the folder that `paths` are relative to
    paths: tuple[str, ...]  # of its Python files, vendored ones left out

    def read(self, most: int) -> Iterator[tuple[str, str]]:
        """Path and text of at most `most` files, the same ones each time. Files that are not UTF-8 are left out."""
        chosen = sorted(self.paths, key=lambda path: digest(f"{self.name}/{path}"))[:most]
        if self.root.suffix == ".whl":
            with zipfile.ZipFile(self.root) as wheel:
                raw = [(path, wheel.read(path)) for path in chosen]
        else:
            raw = [(path, (self.root / path).read_bytes()) for path in chosen if (self.root / path).is_file()]
        for path, data in raw:
            try:
                text = data.decode("utf-8")
            except UnicodeDecodeError:
                continue
            if len(data) <= _LARGEST_FILE and "\0" not in text:
                yield path, text.replace("\r\n", "\n")


@dataclass(frozen=True)
class Unit:
    """A function, a method or a class with a docstring."""

    package: str
    path: str
    kind: str  # "function", "method" or "class"
    name: str
    owner: str  # a method's class
    arguments: str  # without annotations: "data, *, key=None"
    signature: str  # the first statement: "def f(data: list) -> int:"
    docstring: str  # cleaned
    code: str  # dedented, with its docstring
    bare: str  # dedented, without its docstring
    imports: tuple[str, ...]  # statements of its module for the names that it uses


def digest(text: str) -> str:
    """A short digest of a text: names that do not change from run to run, and the order that follows from them."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def find_packages(folder: Path) -> list[Package]:
    """The distributions in a folder of wheels, unpacked wheels or installed packages, in the order of their names.

    A wheel that is no zip file raises zipfile.BadZipFile.
    """
    found = {}
    for wheel in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            metadata = next((each for each in names if re.fullmatch(r"[^/]+\.dist-info/METADATA", each)), None)
            if metadata is not None:
                package = _package(email.message_from_bytes(archive.read(metadata)), wheel, names)
                found[package.name] = package
    for metadata_file in sorted([*folder.glob("*.dist-info/METADATA"), *folder.glob("*/*.dist-info/METADATA")]):
        root = metadata_file.parent.parent
        record = metadata_file.with_name("RECORD")
        if record.exists():
            names = [line.split(",")[0].strip('"') for line in record.read_text(encoding="utf-8").splitlines()]
        else:
            names = [path.relative_to(root).as_posix() for path in root.rglob("*.py")]
        package = _package(email.message_from_bytes(metadata_file.read_bytes()), root, names)
        found[package.name] = package
    return [found[name] for name in sorted(found)]


def _package(metadata: Message, root: Path, names: list[str]) -> Package:
    name = re.sub(r"[-_.]+", "-", str(metadata["Name"])).lower()
    licence, permissive = _licence(metadata)
    refused = "" if permissive else f"its licence is {licence or 'not named'}"
    if name in HELD_OUT_PACKAGES:
        refused = "it is held out"
    payload = metadata.get_payload()
    description = payload if isinstance(payload, str) else ""
    paths = tuple(sorted(path for path in names if path.endswith(".py") and not _left_out(path)))
    return Package(name, str(metadata["Version"]), licence, refused, description, root, paths)


def _licence(metadata: Message) -> tuple[str, bool]:
    """The licence that the metadata names, and whether every part of it is permissive."""
    expression = str(metadata["License-Expression"] or "")
    classifiers = [str(each) for each in metadata.get_all("Classifier") or []]
    named = [each.split(" :: ")[-1] for each in classifiers if each.startswith("License ::")]
    named = [each for each in named if each != "OSI Approved"]
    first_line = next((line.strip() for line in str(metadata["License"] or "").splitlines() if line.strip()), "")
    licence = expression or "; ".join(named) or first_line
    plain = re.sub(r"[()]|\bWITH\s+\S+", " ", licence)  # an exception only adds permissions
    parts = re.split(r"\s+(?:AND|OR)\s+|;\s*", plain)
    enough = all if expression else any  # classifiers also say "Freely Distributable"
    permissive = enough(_PERMISSIVE.search(part) for part in parts) and not any(map(_COPYLEFT.search, parts))
    return licence[:200], permissive


def _left_out(path: str) -> bool:
    parts = PurePosixPath(path).parts
    outside = parts[0] == ".." or any(part.endswith((".data", ".dist-info")) for part in parts)
    vendored = _VENDORED & set(parts) or HELD_OUT_PACKAGES & {part.removesuffix(".py") for part in parts}
    return bool(outside or vendored or parts[-1].endswith("_pb2.py"))


def units(package: str, path: str, text: str) -> Iterator[Unit]:
    """The documented functions, methods and classes of a file; none where it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return
    lines = text.split("\n")
    imports = _imports(tree, PurePosixPath(path).parts[0])
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from _unit(node, (package, path, ""), lines, imports)
        for child in node.body if isinstance(node, ast.ClassDef) else []:
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _unit(
                    child, (package, path, node.name if isinstance(node, ast.ClassDef) else ""), lines, imports
                )


def _unit(
    node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef,
    place: tuple[str, str, str],
    lines: list[str],
    imports: dict[str, str],
) -> Iterator[Unit]:
    package, path, owner = place
    docstring = ast.get_docstring(node)
    if not docstring or node.name.startswith("__") or node.end_lineno is None:
        return
    first = min([node.lineno, *(each.lineno for each in node.decorator_list)]) - 1
    statement = node.body[0]
    assert statement.end_lineno is not None, "ast.parse sets it"
    before, after = lines[first : statement.lineno - 1], lines[statement.end_lineno : node.end_lineno]
    if len(node.body) == 1 or statement.lineno == node.lineno:
        return  # nothing but a docstring
    used = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
    arguments, signature = "", f"class {node.name}:"
    if not isinstance(node, ast.ClassDef):
        prefix = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        signature = f"{prefix} {node.name}({ast.unparse(node.args)}){returns}:"
        arguments = _without_annotations(node.args)
    yield Unit(
        package=package,
        path=path,
        kind="class" if isinstance(node, ast.ClassDef) else "method" if owner else "function",
        name=node.name,
        owner=owner,
        arguments=arguments,
        signature=signature,
        docstring=docstring,
        code=textwrap.dedent("\n".join(lines[first : node.end_lineno])),
        bare=textwrap.dedent("\n".join([*before, *after])),
        imports=tuple(sorted({imports[name] for name in used if name in imports})),
    )


def _imports(tree: ast.Module, own: str) -> dict[str, str]:
    """The absolute imports of public modules of other packages, by the name that each binds."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Import):
            pairs = [(alias, f"import {ast.unparse(alias)}", alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            source = node.module or ""
            pairs = [(alias, f"from {source} import {ast.unparse(alias)}", source) for alias in node.names]
        else:
            continue
        for alias, statement, module in pairs:
            if not re.search(r"(^|\.)_", module) and module.split(".")[0] != own:
                found[alias.asname or alias.name.split(".")[0]] = statement
    found.pop("annotations", None)
    return found


def _without_annotations(arguments: ast.arguments) -> str:
    copy = ast.parse(f"def f({ast.unparse(arguments)}): pass").body[0]
    assert isinstance(copy, ast.FunctionDef), "the text is a function"
    for each in ast.walk(copy.args):
        if isinstance(each, ast.arg):
            each.annotation = None
    return ast.unparse(copy.args)


def sections(docstring: str) -> dict[str, str]:
    """The parts of a docstring in numpy, Google or field style: "description", "returns", "parameters", "raises", ...

    A heading's plural and its synonyms have one key each. What follows a doctest is "examples" too. Cross-reference
    roles become plain code, directives go.
    """
    text = _DIRECTIVE.sub("", _ROLE.sub(r"`\1`", docstring)).replace("``", "`")
    kinds = {"param": "parameters", "parameter": "parameters", "arg": "parameters", "args": "parameters"}
    kinds |= {"arguments": "parameters", "type": "parameters", "return": "returns", "rtype": "returns"}
    kinds |= {"raise": "raises", "yield": "yields", "example": "examples", "usage": "examples", "note": "notes"}
    found: dict[str, list[str]] = {"description": []}
    current = "description"
    for line in text.split("\n"):
        heading, field = _HEADING.match(line), _FIELD.match(line)
        if re.fullmatch(r"\s*[-=~]{3,}\s*", line):
            continue
        if line.lstrip().startswith(">>>"):
            current = "examples"
            found.setdefault(current, [])
        begun = heading or field
        if begun:
            word = begun.group(1).lower()
            current = kinds.get(word, word)
            found.setdefault(current, [])
            if heading:
                continue
            line = line.split(":", 2)[2].strip() if current == "returns" else line[1:]
        found[current].append(line)
    return {name: textwrap.dedent("\n".join(each)).strip() for name, each in found.items()}


def assertions(unit: Unit) -> list[str]:
    """The docstring's examples as assertions: calls of the function whose results are literals."""
    try:
        examples = doctest.DocTestParser().get_examples(unit.docstring)
    except ValueError:
        return []
    found = []
    for example in examples:
        source, want = example.source.strip(), example.want.strip()
        if "\n" in source or "\n" in want or len(source) + len(want) > 200 or f"{unit.name}(" not in source:
            continue
        try:
            ast.literal_eval(want)
            is_call = isinstance(ast.parse(source, mode="eval").body, ast.Call)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if is_call:
            found.append(f"assert {source} == {want}")
    return found
