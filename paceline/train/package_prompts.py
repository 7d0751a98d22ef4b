"""Prompts made of a package's functions, methods, classes and files: one function for each task."""

from __future__ import annotations

import ast
import json
import re
import textwrap
from collections.abc import Callable
from random import Random
from typing import Any

from paceline.train.package_code import Unit, assertions, sections

Prompt = dict[str, Any]  # {"messages": [...]}, and "tools" where the request has some

_LEAST_REST = 8
_LONGEST = 7000  # characters of code in one prompt, about 2,000 tokens

_WRITE = (
    "Write a Python function `{head}` that does this:\n\n{text}",
    "Implement `{head}` in Python.\n\n{text}",
    "I need a Python function. Signature: `{head}`\n\nWhat it should do: {text}",
    "Please write a function named `{name}` with the parameters `({arguments})`. {text}",
    "Create a python function `{name}`.\n\nDescription:\n{text}\n\nSignature:\n```python\ndef {head}:\n```",
    "{text}\n\nWrite this as a Python function `{head}` with type hints and a docstring.",
    "Write a python function to do the following: {text} Name it `{name}`.",
    "How do I write a Python function that does this? {text}",
)
_WITH_TESTS = (
    "You are an expert Python programmer, and here is your task: {text} Your code should pass these tests:\n\n{tests}",
    "Write a function `{head}`. {text}\n\nYour code should pass these tests:\n```python\n{tests}\n```",
    "{text}\nYour code should satisfy these assertions:\n{tests}",
)
_COMPLETE = (
    "Complete the following Python function.\n\n```python\n{code}\n```",
    "Fill in the body of this function:\n```python\n{code}\n```",
    "Please provide a self-contained Python implementation of this stub in a markdown code block:\n```\n{code}\n```",
    "Here is a signature with its docstring. Write the implementation.\n\n```python\n{code}\n```",
)
_CLASSES = (
    "Write a Python class `{name}`.\n\n{text}\n\nIt needs these methods:\n{methods}",
    "Implement the class `{name}` in Python: {text}\n\nMethods:\n{methods}\n\nReturn only the code.",
    "Design a class called `{name}`. {text} Provide at least:\n{methods}",
)
_EXPLAIN = (
    "Explain what this code does.\n\n```python\n{code}\n```",
    "What does `{name}` do? Explain it step by step.\n```python\n{code}\n```",
    "I am new to this code base. Walk me through this {kind}:\n\n```python\n{code}\n```",
    "Review this code. Name problems, edge cases and what you would improve.\n\n```python\n{code}\n```",
    "Summarise this {kind} in a few sentences, then show an example of its use.\n\n```python\n{code}\n```",
    "```python\n{code}\n```\n\nWhat is the time complexity of this, and which inputs would make it fail?",
)
_TESTS = (
    "Write pytest tests for this {kind}.\n\n```python\n{code}\n```",
    "Write unit tests that cover the edge cases of `{name}`:\n```python\n{code}\n```",
    "Please add tests with pytest, parametrized where that helps:\n\n```python\n{code}\n```",
    "Write a unittest.TestCase for the following code. Mock what is external.\n\n```python\n{code}\n```",
)
_FIX = (
    "This {kind} gives wrong results. Find the bug and fix it.\n\n```python\n{code}\n```",
    "There is a bug in `{name}`. Return the corrected code and say in one sentence what was wrong.\n```python\n{code}\n```",
    "Tests of this code fail. It should do this: {text}\n\n```python\n{code}\n```\n\nFix it.",
    "Find and fix the mistake:\n\n```python\n{code}\n```\nShow the whole fixed {kind}.",
)
_CONTINUE = (
    "Continue this file:\n\n```python\n{code}\n```",
    "Here is the beginning of `{path}`. Write what comes next.\n```python\n{code}\n```",
    "Complete the code below. Do not repeat it.\n\n```python\n{code}\n```",
    "```python\n# {path}\n{code}\n```\n\nFinish this module.",
)
_EDIT_ASK = (
    "{ask}\n\n```python\n{code}\n```\n\nReturn the whole changed code.",
    "```python\n{code}\n```\n\n{ask} Reply with the complete code and nothing else.",
    "Here is a {kind} of `{path}`:\n```python\n{code}\n```\n{ask}",
    "Please change the code below. {ask}\n\n```python\n{code}\n```",
    "<code>\n{code}\n</code>\n\n<instruction>{ask}</instruction>\n\nWrite the full updated code.",
)
_EDITS = (
    "Add type hints to all parameters and the return value.",
    "Add type annotations.",
    "Write a docstring in Google style for it.",
    "Add a NumPy style docstring with Parameters and Returns sections.",
    "Add input validation that raises ValueError with a clear message.",
    "Handle errors: catch the exceptions that can occur here and log them.",
    "Add logging with the standard logging module at the important steps.",
    "Refactor it into smaller functions without changing what it does.",
    "Simplify the control flow with early returns.",
    "Replace string formatting with f-strings.",
    "Use pathlib where file paths are handled, and comprehensions where loops build lists.",
    "Make it faster without changing its results.",
    "Add a keyword parameter `verbose=False` that prints progress.",
    "Add an optional parameter `timeout=None` and use it sensibly.",
    "Make it asynchronous with async/await.",
    "Cache its results with functools.lru_cache where that is safe.",
    "Add comments that explain the difficult lines.",
    "Remove dead code and unused variables.",
    "Rewrite it for Python 3.11 idioms.",
    "Rename the variables so that they say what they hold.",
    "Make it thread-safe.",
    "Turn magic numbers into named constants.",
    "Add a `dry_run` option that changes nothing and only reports.",
    "Return a dataclass instead of a tuple or dict.",
)
_CLASS_EDITS = (
    "Convert it to a dataclass.",
    "Add a `__repr__` and an `__eq__` method.",
    "Add a `to_dict` method and a `from_dict` class method.",
    "Turn the getters and setters into properties.",
    "Add a context manager interface (`__enter__` and `__exit__`).",
    "Add docstrings to all methods.",
)
_MUTATIONS = (
    (" < ", " <= "),
    (" > ", " >= "),
    (" <= ", " < "),
    (" == ", " != "),
    (" + ", " - "),
    (" - ", " + "),
    (" * ", " + "),
    (" and ", " or "),
    (" or ", " and "),
    (" not in ", " in "),
    (" is not None", " is None"),
    ("if not ", "if "),
    ("[0]", "[1]"),
    ("[-1]", "[0]"),
    (" + 1", ""),
    ("True", "False"),
    ("break", "continue"),
    ("max(", "min("),
    ("len(", "sum("),
)
_TOOLS = {
    "bash": ("Runs a shell command in the repository and returns its output.", {"command": "the command line"}),
    "read_file": ("Returns a file's text.", {"path": "relative path", "start": "first line", "end": "last line"}),
    "write_file": ("Writes a file, replacing what was there.", {"path": "relative path", "content": "the whole text"}),
    "edit_file": (
        "Replaces one exact piece of text in a file.",
        {"path": "relative path", "old_text": "text to replace", "new_text": "its replacement"},
    ),
    "grep": ("Searches the files for a regular expression.", {"pattern": "regular expression", "path": "folder"}),
    "list_files": ("Lists a folder.", {"path": "relative path"}),
    "run_tests": ("Runs pytest.", {"target": "file or test id"}),
    "finish": ("Ends the task with a summary for the user.", {"summary": "what was done"}),
}
_AGENT = (
    "You are a coding agent. You work in the repository of {package} and use tools to read and change it.",
    "You are an expert software engineer with access to tools. Take one step at a time.",
    "You help a user with the Python project {package}. Call a tool when you need to look at or change files.",
)
_REQUESTS = (
    "Where is `{name}` defined, and what calls it?",
    "{ask} It is `{name}` in {path}.",
    "`{name}` in {path} fails for empty input. Please fix it.",
    "Write tests for `{name}` ({path}) and run them.",
    "Explain how `{name}` in {path} works.",
    "Create a file example.py that shows how to use `{name}` of {path}.",
    "Rename `{name}` to `{name}_v2` in the whole project, with its uses.",
)


def user(text: str) -> Prompt:
    """A prompt of one user message."""
    return {"messages": [{"role": "user", "content": text}]}


def fields(unit: Unit) -> dict[str, str]:
    """What the wordings may name of a unit."""
    text = re.sub(r"\n\s*\n.*", "", sections(unit.docstring)["description"], flags=re.DOTALL) or unit.docstring
    return {
        "name": unit.name,
        "package": unit.package,
        "path": unit.path,
        "kind": unit.kind,
        "arguments": unit.arguments,
        "head": f"{unit.name}({unit.arguments})",
        "text": " ".join(text.split())[:800],
    }


def function(unit: Unit, random: Random) -> Prompt | None:
    """Asks for a function from its docstring, in one of several styles; for a class from its methods' summaries."""
    if unit.kind == "method" or unit.name.startswith("_") or len(unit.docstring) < 40:
        return None
    if unit.kind == "class":
        return _class(unit, random)
    values = fields(unit)
    values["tests"] = "\n".join(assertions(unit)[:4])
    if values["tests"] and random.random() < 0.7:
        return user(random.choice(_WITH_TESTS).format(**values))
    style = random.random()
    if style < 0.45:
        return user(_task_function(unit))
    if style < 0.65:
        docstring = textwrap.indent(f'"""{unit.docstring}\n"""', "    ")
        code = "\n".join([*unit.imports, "\n" * bool(unit.imports) + unit.signature, docstring])
        return user(random.choice(_COMPLETE).format(code=code[:4000]))
    return user(random.choice(_WRITE).format(**values))


def _task_function(unit: Unit) -> str:
    """The style of BigCodeBench's instruct prompts: description, arguments, output, and the code to begin with."""
    parts = sections(unit.docstring)
    text = " ".join(parts["description"].split())[:1500]
    if parts.get("parameters"):
        text += f" Args: {' '.join(parts['parameters'].split())[:1200]}"
    if parts.get("raises"):
        text += f"\nThe function should raise the exception for: {' '.join(parts['raises'].split())[:400]}"
    if parts.get("returns"):
        text += f"\nThe function should output with:\n{textwrap.indent(parts['returns'][:600], '    ')}"
    start = "\n".join([*unit.imports, f"def task_func({unit.arguments}):"])
    return f"{text}\nYou should write self-contained code starting with:\n```\n{start}\n```"


def _class(unit: Unit, random: Random) -> Prompt | None:
    found = re.findall(r"^    (?:async )?def ([a-z]\w*\(.*\)).*:$", unit.bare, flags=re.MULTILINE)
    if not 2 <= len(found) <= 12:
        return None
    methods = "\n".join(f"- `{each}`" for each in found)
    return user(random.choice(_CLASSES).format(**fields(unit), methods=methods))


def _with_code(wordings: tuple[str, ...], longest: int = _LONGEST) -> Callable[[Unit, Random], Prompt | None]:
    def make(unit: Unit, random: Random) -> Prompt | None:
        code = unit.code if random.random() < 0.5 else unit.bare
        if not 120 <= len(code) <= longest:
            return None
        return user(random.choice(wordings).format(**fields(unit), code=code.rstrip()))

    return make


explain = _with_code(_EXPLAIN)
tests = _with_code(_TESTS, 5000)


def edit(unit: Unit, random: Random) -> Prompt | None:
    """Asks for the unit with a change: a general one, or a new name for one of its variables."""
    code = unit.bare.rstrip()
    if not 120 <= len(code) <= 4000:
        return None
    ask = random.choice(_CLASS_EDITS + _EDITS[:8] if unit.kind == "class" else _EDITS)
    if random.random() < 0.15:
        names = sorted(set(re.findall(r"^\s+([a-z]\w{2,}) = ", code, flags=re.MULTILINE)))
        if names:
            name = random.choice(names)
            ask = f"Rename `{name}` to `{random.choice(('new_', 'current_', 'local_'))}{name}` everywhere."
    return user(random.choice(_EDIT_ASK).format(**fields(unit), ask=ask, code=code))


def mutate(code: str, random: Random) -> str | None:
    """The code with one operator, constant or call changed; None where nothing can be changed or it no longer parses."""
    places = [
        (match.start(), old, new)
        for old, new in _MUTATIONS
        for match in re.finditer(re.escape(old), code)
        if "#" not in code[code.rfind("\n", 0, match.start()) + 1 : match.start()]
    ]
    if not places:
        return None
    start, old, new = random.choice(places)
    changed = code[:start] + new + code[start + len(old) :]
    try:
        same = ast.dump(ast.parse(changed)) == ast.dump(ast.parse(code))
    except (SyntaxError, ValueError, RecursionError):
        return None
    return None if same else changed


def fix(unit: Unit, random: Random) -> Prompt | None:
    """Asks for the mistake in a mutated unit."""
    code = mutate(unit.bare, random) if 150 <= len(unit.bare) <= 4000 else None
    return user(random.choice(_FIX).format(**fields(unit), code=code.rstrip())) if code else None


def tool(unit: Unit, random: Random) -> Prompt | None:
    """An agent's request with tools, in "tools" or in the system message; half of them after the file was read."""
    if len(unit.code) > 4000:
        return None
    names = ["read_file", *random.sample([each for each in _TOOLS if each != "read_file"], random.randint(2, 6))]
    tools = [_tool(name) for name in names]
    values = fields(unit)
    system = random.choice(_AGENT).format(**values)
    wordings = _REQUESTS if unit.kind != "class" else _REQUESTS[:-1]
    request = random.choice(wordings).format(**values, ask=random.choice(_EDITS))
    in_text = random.random() < 0.4
    if in_text:
        listed = "\n".join(json.dumps(each["function"]) for each in tools)
        system += (
            f"\n\nTools:\n{listed}\n\nTo call one, reply with\n<tool_call>\n"
            '{"name": ..., "arguments": {...}}\n</tool_call>'
        )
    messages = [{"role": "system", "content": system}, {"role": "user", "content": request}]
    if random.random() < 0.5:
        call = json.dumps({"name": "read_file", "arguments": {"path": unit.path}})
        messages.append({"role": "assistant", "content": f"<tool_call>\n{call}\n</tool_call>"})
        messages.append({"role": "user", "content": f"<tool_response>\n{unit.code}\n</tool_response>"})
    return {"messages": messages} if in_text else {"messages": messages, "tools": tools}


def _tool(name: str) -> dict[str, Any]:
    description, arguments = _TOOLS[name]
    properties = {each: {"type": "string", "description": text} for each, text in arguments.items()}
    parameters = {"type": "object", "properties": properties, "required": list(arguments)[:1]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def continuation(path: str, text: str, random: Random) -> Prompt | None:
    """Asks for what follows the first lines of a file, its leading comments left out, or lines from within it.

    At least _LEAST_REST lines are left to write.
    """
    lines = text.split("\n")
    first = next((index for index, line in enumerate(lines) if line.strip() and not line.startswith("#")), len(lines))
    if len(lines) - first < 30:
        return None
    if random.random() < 0.4:
        starts = [index for index, line in enumerate(lines) if re.match(r"(async )?def |class |@", line)]
        first = random.choice(starts) if starts else first
    code = "\n".join(lines[first : min(first + random.randint(8, 90), len(lines) - _LEAST_REST)])[:_LONGEST].rstrip()
    return user(random.choice(_CONTINUE).format(path=path, code=code)) if len(code) > 200 else None


MAKERS: dict[str, Callable[[Unit, Random], Prompt | None]] = {
    "function": function,
    "edit": edit,
    "tests": tests,
    "explain": explain,
    "fix": fix,
    "tool": tool,
}
