"""The import rule: every module imports only its own level's parts and lower ones (the table is in DESIGN)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "paceline"
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
TOP = {"cli", "__main__", "__init__", "route"}
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))


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


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part in TOP:
        return
    assert imported(path) - {part} <= ALLOWED[part], f"{path} imports from above its level"
