"""A small data set and small packages in the forms that paceline.train.prompts reads."""

from __future__ import annotations

import gzip
import json
import random
import zipfile
from pathlib import Path
from typing import Any

FUNCTIONS = 24


def write_data(folder: Path) -> Path:
    """A data set with all files that prompts are made of; each MBPP record names its number."""
    mbpp = [mbpp_record(number) for number in range(1, 181)]
    hard = {
        "BigCodeBench/1": {
            "instruct_prompt": "Count zebras in a savanna photo. You should write self-contained code starting with: x",
            "complete_prompt": "def task_func(photo):\n    '''Count zebras in a savanna photo.'''",
            "canonical_solution": "    return len(zebras(photo, threshold=17))",
            "test": "self.assertEqual(task_func('savanna.png'), 17)",
        }
    }
    edits = [
        edit("pallets/flask", "dev", 0, "flaskish"),
        *(edit("encode/httpx", "train", number, "client") for number in range(4)),
        *(edit("Aider-AI/aider", "train", number, "coder") for number in range(4, 30)),
    ]
    exercise = {"instructions": "Encode text.", "stub": "def encode(text):\n    pass", "stub_name": "cipher.py"}
    user, system = {"role": "user", "content": "Fix the parser."}, {"role": "system", "content": "One command a reply."}
    reply = {"role": "assistant", "content": "THOUGHT: look"}
    files: dict[str, Any] = {
        "prompts/mbpp.jsonl.gz": mbpp,
        "prompts/bigcodebench_hard.json.gz": hard,
        "prompts/polyglot_python.jsonl.gz": [{**exercise, "example": "def encode(text):\n    return text", "test": ""}],
        "prompts/mt_bench_question.jsonl.gz": [
            {"category": each, "turns": [f"A question of {each}."]}
            for each in ("writing", "roleplay", "coding", "stem")
        ],
        "prompts/spec_bench_question.jsonl.gz": [
            {"category": "summarization", "turns": [f"Summarise article {number}."]} for number in range(32)
        ],
        "edits/git_edits.jsonl.gz": edits,
        "edits/aider_llm_edits.jsonl.gz": [{"before": "x = 1\n", "user": "Rename x.", "path": "a.py", "subject": ""}],
        "edits/quixbugs_python.jsonl": [{"before": "def bitcount(n):\n    return n\n"}],
        "traces/mini_swe_agent_gemini3.jsonl.gz": [
            {"instance_id": "django__django-1", "messages": [system, user, reply, {**user, "content": "<output>"}]},
            {"instance_id": "psf__requests-1", "messages": [system, {**user, "content": "Fix the requests session."}]},
        ],
        "traces/swe_smith_ft_xml_example.jsonl.gz": [{"messages": [system, {**user, "content": "Fix the lexer."}]}],
        "traces/openhands_integration_prompts.jsonl.gz": [{"prompt": "Write hello.sh."}],
    }
    for name, records in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        is_lines = ".jsonl" in name
        text = "".join(json.dumps(each) + "\n" for each in records) if is_lines else json.dumps(records)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return folder


def mbpp_record(number: int) -> dict[str, Any]:
    """A record whose words are unlike those of other records."""
    nouns = random.Random(number).sample([f"noun{index}" for index in range(500)], 14)
    tests = [f"assert task_{number}([{number}, {index}]) == {number + index}" for index in range(3)]
    text = f"Write a function to find the {' '.join(nouns)} of record{number}."
    code = f"def task_{number}(xs):\r\n    return sum(xs)"
    return {"text": text, "code": code, "task_id": number, "test_list": tests}


def edit(repository: str, split: str, number: int, word: str) -> dict[str, Any]:
    lines = [f"def {word}_{number}_{index}():\n    return {index}\n" for index in range(12)]
    return {
        "repo": repository,
        "split": split,
        "commit": f"{number:040x}",
        "path": f"{word}.py",
        "subject": f"fix: Correct {word} {number} (#{number})",
        "before": "\n".join(lines),
        "after": "\n".join(lines).replace("return 6", "return 66"),
    }


def module(package: str) -> str:
    """Source text of documented functions and a class; every name tells the package."""
    functions = [
        f'def {package}_{index}(values, scale={index}):\n    """Scale the values of {package} by a factor and sum {index}.\n\n'
        f"    Args:\n        values: numbers to scale\n\n    Returns:\n        float: the scaled sum\n\n"
        f"    >>> {package}_{index}([1, 2])\n    {3 * index}\n"
        f'    """\n    total = 0\n    for value in values:\n        if value < 0 and scale == {index}:\n            continue\n'
        f"        total = total + value * scale\n    return total\n"
        for index in range(FUNCTIONS)
    ]
    methods = "".join(f"    def method_{index}(self, value):\n        return value + {index}\n\n" for index in range(4))
    described = (
        f'class {package.title()}Box:\n    """Holds values of {package}, in the order of their arrival."""\n\n{methods}'
    )
    return "\n\n".join(["# Copyright", "import math\n\nfrom os import path", *functions, described])


def write_wheel(
    folder: Path, name: str, licence: str = "License-Expression: MIT", files: dict[str, str] | None = None
) -> Path:
    """A wheel with a module `name`/core.py of its own, or with `files`. `licence` is a line of its metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for file, text in (files or {f"{name}/core.py": module(name)}).items():
            wheel.writestr(file, text)
        wheel.writestr(
            f"{name}-1.0.dist-info/METADATA", f"Name: {name}\nVersion: 1.0\n{licence}\n\n# {name}\n\nA README."
        )
    return path
