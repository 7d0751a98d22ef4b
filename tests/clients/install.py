"""Installs the real clients in a scratch folder, in the versions that the checks were written for; reuses earlier ones."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import venv
from pathlib import Path

SYSTEM = {"Linux": "linux", "Darwin": "darwin"}.get(platform.system(), "linux")
MACHINE = {"x86_64": "x64", "AMD64": "x64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
CLAUDE = f"@anthropic-ai/claude-code-{SYSTEM}-{MACHINE}"
OPENCODE = f"opencode-{SYSTEM}-{MACHINE}"
AI_SDK = ("ai@6.0.326", "@ai-sdk/anthropic@3.0.140", "@ai-sdk/openai@3.0.141", "@ai-sdk/openai-compatible@2.0.92")
NODE_PACKAGES = {
    "claude": ("--force", f"{CLAUDE}@2.1.331"),
    "codex": ("@openai/codex@0.169.0",),
    "opencode": ("--ignore-scripts", "opencode-ai@1.18.33"),
    "node": ("@anthropic-ai/sdk@1.13.0", "@morphllm/morphsdk@0.2.196", *AI_SDK),
}
PYTHON_PACKAGES = {
    "python": ("openai==3.57.0", "anthropic==2.13.0"),
    "mini": ("mini-swe-agent==2.4.6",),
    "aider": ("aider-chat==0.86.2",),
}
PROGRAMS = {
    "claude": f"claude/node_modules/{CLAUDE}/claude",
    "codex": "codex/node_modules/.bin/codex",
    "opencode": f"opencode/node_modules/{OPENCODE}/bin/opencode",
    "aider": "aider/bin/aider",
    "mini": "mini/bin/mini",
}


def install(scratch: Path) -> Path:
    """Installs the missing clients in `scratch` (1.5 GB in all); returns a folder with the programs under their names."""
    if shutil.which("npm") is None:
        raise SystemExit("the clients need node 20 or later, with npm")
    for name, packages in NODE_PACKAGES.items():
        extra = (_openai_for_node(),) if name == "node" else ()
        _once(scratch / name, (*packages, *extra), _npm)
    for name, packages in PYTHON_PACKAGES.items():
        _once(scratch / name, packages, _pip)
    programs = scratch / "bin"
    programs.mkdir(exist_ok=True)
    for name, place in PROGRAMS.items():
        link = programs / name
        link.unlink(missing_ok=True)
        link.symlink_to(scratch / place)
    return programs


def _openai_for_node() -> str:
    """The version of OpenAI's package: 7 and later need node 22."""
    version = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout
    return "openai@7.57.0" if int(version.strip("v").split(".")[0]) >= 22 else "openai@6.49.0"


def _once(folder: Path, packages: tuple[str, ...], run: object) -> None:
    stamp = folder / ".installed"
    wanted = "\n".join(packages)
    if stamp.exists() and stamp.read_text() == wanted:
        return
    print(
        f"installing {' '.join(each for each in packages if not each.startswith('--'))} ...",
        file=sys.stderr,
        flush=True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    assert callable(run)
    run(folder, packages)
    stamp.write_text(wanted)


def _npm(folder: Path, packages: tuple[str, ...]) -> None:
    (folder / "package.json").write_text('{"private": true}\n')
    quiet = ("--no-audit", "--no-fund", "--loglevel=error")
    subprocess.run(["npm", "install", *quiet, *packages], cwd=folder, check=True, stdout=sys.stderr)


def _pip(folder: Path, packages: tuple[str, ...]) -> None:
    venv.create(folder, with_pip=True)
    command = [folder / "bin/python", "-m", "pip", "--disable-pip-version-check", "--quiet", "install", *packages]
    subprocess.run(command, check=True, stdout=sys.stderr)
