"""Rules on imports, private names and signatures. docs/architecture.md ("Layers") and CONTRIBUTING.md explain them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "paceline"
BASE = {"types", "errors", "config", "env", "interrupts"}
ALLOWED = {
    "types": {"errors"},
    "errors": set[str](),
    "env": {"errors"},
    "interrupts": set(),
    "config": {"errors", "types", "env"},
    "ops": BASE,
    "collective": BASE,
    "storage": BASE,
    "kv": BASE | {"ops", "collective", "storage"},
    "models": BASE | {"ops", "collective", "storage", "kv"},
    "drafters": BASE | {"ops", "collective", "storage", "kv", "models"},
    "engine": BASE | {"ops", "collective", "storage", "kv", "models", "drafters"},
    "tasks": BASE | {"ops", "kv", "models", "drafters", "engine"},
    "serve": BASE | {"kv", "models", "engine", "tasks"},
    "train": BASE | {"ops", "kv", "models", "drafters"},
    "search": BASE | {"ops"},
    "plugins": BASE | {"drafters", "ops", "storage", "collective", "models", "kv"},
}
TOP = {"cli", "cli_train", "__main__", "__init__", "route"}
MODULES = sorted(PACKAGE.rglob("*.py"))
BENCHMARKS = sorted(path for path in (ROOT / "benchmarks").rglob("*.py") if ".venv" not in str(path))

MOST_PARAMETERS = 8
KERNELS = (PACKAGE / "ops" / "triton", PACKAGE / "ops" / "native")
# Functions with more parameters than MOST_PARAMETERS, and the reason for each.
MANY_PARAMETERS = {
    "paceline/cli.py::generate": "typer makes each parameter an option of the command",
    "paceline/cli.py::apply": "typer makes each parameter an option of the command",
    "paceline/cli.py::serve": "typer makes each parameter an option of the command",
    "paceline/cli_train.py::samples": "typer makes each parameter an option of the command",
    "paceline/cli_train.py::drafter": "typer makes each parameter an option of the command",
    "paceline/cli_train.py::evaluate_drafter": "typer makes each parameter an option of the command",
}


def imported(path: Path) -> set[str]:
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the direction"
            names = [
                f"{node.module}.{alias.name}" if node.module == "paceline" else node.module or ""
                for alias in node.names
            ]
        parts |= {name.split(".")[1] for name in names if name.startswith("paceline.")}
    return parts


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_imports_go_down(path: Path) -> None:
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part in TOP:
        return
    assert imported(path) - {part} <= ALLOWED[part], f"{path} imports from above its level"


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def private_uses(path: Path) -> list[str]:
    """Private names of other modules of this repository that a module imports, or reads from what it imports."""
    tree = ast.parse(path.read_text())
    found, ours = [], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("paceline", "benchmarks"):
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            found += [f"line {node.lineno}: {part}" for part in parts if is_private(part)]
            ours |= {alias.asname or alias.name for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and is_private(node.attr):
            found += [f"line {node.lineno}: {node.value.id}.{node.attr}"] if node.value.id in ours else []
    return found


@pytest.mark.parametrize("path", MODULES + BENCHMARKS, ids=named)
def test_no_private_name_is_imported(path: Path) -> None:
    assert private_uses(path) == [], f"{path} uses private names of another module"


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Each function of a module as "file::Class.function", with its number of parameters besides self and cls."""

    def within(node: ast.AST, prefix: str) -> Iterator[tuple[str, int]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                arguments = child.args
                every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
                yield f"{prefix}{child.name}", sum(each.arg not in ("self", "cls") for each in every)
            inside = getattr(child, "name", "")
            yield from within(child, f"{prefix}{inside}." if inside else prefix)

    return within(ast.parse(path.read_text()), f"{named(path)}::")


def test_functions_have_few_parameters_or_a_reason() -> None:
    sources = [path for path in MODULES + BENCHMARKS if not any(path.is_relative_to(each) for each in KERNELS)]
    many = {name: count for path in sources for name, count in functions(path) if count > MOST_PARAMETERS}
    unexplained = {name: count for name, count in many.items() if name not in MANY_PARAMETERS}
    assert not unexplained, f"more than {MOST_PARAMETERS} parameters: {unexplained}"
    stale = MANY_PARAMETERS.keys() - many.keys()
    assert not stale, f"these have few parameters by now: {sorted(stale)}"
