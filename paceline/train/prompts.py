"""Prompts for training drafters: lines of {"messages", "task", "source"}, from the data set and from packages' source text."""

from __future__ import annotations

import gzip
import json
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from paceline.errors import InputError
from paceline.train.contamination import load_held_out, remove_contaminated, words
from paceline.train.data_prompts import data_prompts
from paceline.train.package_code import Package, Unit, digest, find_packages, units
from paceline.train.package_prompts import MAKERS, Prompt, continuation, user
from paceline.train.synthetic_tasks import library_task, short_task

# shares of the prompts; what agents ask coding models for, with the most weight on writing functions
MIX = {"function": 0.45, "edit": 0.15, "continue": 0.10, "tests": 0.10, "explain": 0.08, "fix": 0.07, "tool": 0.05}
_SYNTHETIC = 0.4  # of the function prompts, half of them in the style of MBPP and half over libraries
_FILES = 120  # of one package that are read, so that large packages do not crowd out the others
_MARGIN = 1.15  # prompts made for each one wanted: duplicates and contaminated ones go
_VALIDATION = 20  # one package in so many is kept for validation


@dataclass(frozen=True)
class PromptSettings:
    """What to make. `num_validation` prompts of the same mix come from packages and records that training never sees."""

    num_prompts: int = 40_000
    num_validation: int = 500
    seed: int = 0


def is_validation(package: str) -> bool:
    """Whether a package's text is for validation alone. It depends on the name only."""
    return int(digest(package), 16) % _VALIDATION == 0


def write_prompts(
    output: Path,
    data: Path,
    packages: Path | None = None,
    settings: PromptSettings | None = None,
    benchmarks: Iterable[Path] = (),
) -> dict[str, Any]:
    """Writes prompts.jsonl, heldout_prompts.jsonl and sources.json to the folder `output`; returns the content of the last.

    `data` is the data set's folder; `packages` has wheels, or unpacked or installed packages, and is by default where this
    Python's packages are installed; `benchmarks` are more texts that no prompt may share 13 words with. The same arguments
    give the same bytes. Raises InputError where a file of the data set is missing or no package may be used.
    """
    settings = settings or PromptSettings()
    packages = packages or Path(sysconfig.get_paths()["purelib"])
    found = find_packages(packages)
    if all(package.refused for package in found):
        raise InputError(f"no package in {packages} has a permissive licence in its metadata")
    held_out = load_held_out(data, benchmarks)
    counts = {False: settings.num_prompts, True: settings.num_validation}
    reports = {}
    seen: set[str] = set()
    for validation in (True, False):
        random = Random(f"{settings.seed} {validation}")
        chosen = [each for each in found if not each.refused and is_validation(each.name) == validation]
        records = list(_records(data, chosen, counts[validation], random, seen, validation))
        kept, contamination = remove_contaminated(records, held_out)
        mixed = _mixed(kept, counts[validation], random)
        name = "heldout_prompts.jsonl" if validation else "prompts.jsonl"
        write_records(output / name, mixed)
        reports[name] = {
            "prompts": len(mixed),
            "tasks": dict(sorted(Counter(record["task"] for record in mixed).items())),
            "sources": dict(sorted(Counter(record["source"] for record in mixed).items())),
            "contamination": contamination.summary(),
        }
    about = {
        "seed": settings.seed,
        "files": reports,
        "packages": [_described(package) for package in found if not package.refused],
        "refused": {package.name: package.refused for package in found if package.refused},
    }
    (output / "sources.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return about


def _described(package: Package) -> dict[str, str]:
    use = "validation" if is_validation(package.name) else "training"
    return {"name": package.name, "version": package.version, "licence": package.licence, "use": use}


def write_records(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Writes records as lines of JSON, compressed where the name ends in .gz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    data = text.encode("utf-8", "replace")
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def _records(
    data: Path, packages: list[Package], num_wanted: int, random: Random, seen: set[str], validation: bool
) -> Iterator[dict[str, Any]]:
    """More prompts than are wanted of each task, without duplicates of each other and of those `seen` before."""
    have: Counter[str] = Counter()
    wanted = {task: int(num_wanted * share * _MARGIN) + 1 for task, share in MIX.items()}
    for task, source, prompt in data_prompts(data, random, validation):
        if have[task] < wanted[task] // 2 and _is_new(prompt, seen):
            have[task] += 1
            yield {**prompt, "task": task, "source": source}
    for index in range(int(wanted["function"] * _SYNTHETIC)):
        synthetic = user((short_task, library_task)[index % 2](random))
        if _is_new(synthetic, seen):
            have["function"] += 1
            yield {**synthetic, "task": "function", "source": "synthetic"}
    pools = _pools(packages, random)
    names = sorted(pools)
    while names and any(have[task] < wanted[task] for task in MIX):
        for name in list(names):
            made = _next(pools[name], random, have, wanted)
            if made is None:
                names.remove(name)
                continue
            task, found = made
            if found is not None and _is_new(found, seen):
                have[task] += 1
                yield {**found, "task": task, "source": name}


@dataclass
class _Pool:
    """What is left of one package."""

    units: list[Unit]
    files: list[tuple[str, str]]


def _pools(packages: list[Package], random: Random) -> dict[str, _Pool]:
    pools = {}
    for package in packages:
        pool = _Pool([], [])
        for path, text in package.read(_FILES):
            found = list(units(package.name, path, text))
            pool.units += found
            if found:
                pool.files.append((path, text[:40_000]))
        random.shuffle(pool.units)
        random.shuffle(pool.files)
        if pool.units:
            pools[package.name] = pool
    return pools


def _next(pool: _Pool, random: Random, have: Counter[str], wanted: dict[str, int]) -> tuple[str, Prompt | None] | None:
    """A task and a prompt of it from the next unit or file; no prompt where it gives none; None when nothing is left."""
    open_tasks = [
        task for task in MIX if have[task] < wanted[task] and (pool.files if task == "continue" else pool.units)
    ]
    if not open_tasks:
        return None
    # the tasks that are furthest from their share come up most
    task = random.choices(open_tasks, [wanted[each] - have[each] for each in open_tasks])[0]
    if task == "continue":
        path, text = pool.files[0]
        pool.files.append(pool.files.pop(0))
        if random.random() < 0.25:
            pool.files.pop()
        return task, continuation(path, text, random)
    return task, MAKERS[task](pool.units.pop(), random)


def _is_new(prompt: Prompt, seen: set[str]) -> bool:
    """Whether no earlier prompt had the same words; remembers it."""
    key = digest(" ".join(words("\n".join(message["content"] for message in prompt["messages"]))))
    if key in seen:
        return False
    seen.add(key)
    return True


def _mixed(records: list[dict[str, Any]], num_wanted: int, random: Random) -> list[dict[str, Any]]:
    """At most `num_wanted` records in the shares of MIX, in random order."""
    random.shuffle(records)
    chosen = []
    for task, share in MIX.items():
        chosen += [record for record in records if record["task"] == task][: round(num_wanted * share)]
    random.shuffle(chosen)
    return chosen
