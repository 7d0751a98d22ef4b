"""Training prompts: what they are made of, what they never contain, and that they are the same each time."""

from __future__ import annotations

import ast
import hashlib
import json
import re
from pathlib import Path
from random import Random
from typing import Any

import pytest

from paceline.errors import InputError
from paceline.train.contamination import read_records
from paceline.train.data_prompts import VALIDATION_MBPP, data_prompts, mbpp_prompt, update_snippet
from paceline.train.package_code import Unit, assertions, find_packages, sections, units
from paceline.train.package_prompts import continuation, function, mutate, tool
from paceline.train.prompts import MIX, PromptSettings, is_validation, write_prompts
from paceline.train.study_texts import write_evaluation, write_general, write_generic_text
from paceline.train.synthetic_tasks import library_task, short_task
from tests.train.prompt_files import FUNCTIONS, mbpp_record, module, write_data, write_wheel

SETTINGS = PromptSettings(num_prompts=300, num_validation=40)
NAMES = [f"pack{index}" for index in range(30)]
FORBIDDEN = ("requests", "rich", "flask")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packages")
    for name in (*NAMES, *FORBIDDEN):
        write_wheel(folder, name)
    write_wheel(folder, "copyleft", "Classifier: License :: OSI Approved :: GNU General Public License v3 (GPLv3)")
    write_wheel(folder, "unnamed", "Summary: no licence")
    vendored = {"vendors/_vendor/rich/core.py": module("vendoredrich"), "vendors/flask.py": module("vendoredflask")}
    write_wheel(folder, "vendors", files={**vendored, "vendors/core.py": module("vendors")})
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, data: Path, packages: Path) -> Path:
    output = tmp_path_factory.mktemp("prompts")
    write_prompts(output, data, packages, SETTINGS)
    return output


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def unit_of(source: str, name: str) -> Unit:
    return next(unit for unit in units("pack", "pack/core.py", source) if unit.name == name)


def test_prompts_have_the_mix_and_no_duplicates(written: Path) -> None:
    for name, wanted in (("prompts.jsonl", 300), ("heldout_prompts.jsonl", 40)):
        records = lines(written / name)
        for task, share in MIX.items():
            num_of_task = sum(record["task"] == task for record in records)
            assert abs(num_of_task - wanted * share) <= 1, task
        texts = [json.dumps(record["messages"]) for record in records]
        assert len(set(texts)) == len(texts)
        for record in records:
            assert record["messages"][-1]["role"] == "user"
            assert all(isinstance(message["content"], str) and message["content"] for message in record["messages"])


def test_the_same_arguments_give_the_same_bytes(written: Path, tmp_path: Path, data: Path, packages: Path) -> None:
    write_prompts(tmp_path / "again", data, packages, SETTINGS)
    write_prompts(tmp_path / "other", data, packages, PromptSettings(num_prompts=300, num_validation=40, seed=1))
    for name in ("prompts.jsonl", "heldout_prompts.jsonl", "sources.json"):
        digests = [hashlib.sha256((folder / name).read_bytes()).digest() for folder in (written, tmp_path / "again")]
        assert digests[0] == digests[1], name
    assert (tmp_path / "other/prompts.jsonl").read_bytes() != (written / "prompts.jsonl").read_bytes()


def test_held_out_sources_never_appear(written: Path, data: Path) -> None:
    text = (written / "prompts.jsonl").read_text() + (written / "heldout_prompts.jsonl").read_text()
    for name in (*FORBIDDEN, "copyleft", "unnamed", "vendoredrich", "vendoredflask"):
        assert f"{name}_" not in text and f"{name.title()}Box" not in text, name
    assert "vendors_" in text
    assert "zebras" not in text and "flaskish" not in text and "requests session" not in text
    # every prompt of MBPP that could be made, not only those that were chosen
    made = " ".join(json.dumps(each) for flag in (False, True) for each in data_prompts(data, Random(0), flag))
    numbers = {int(each) for each in re.findall(r"record(\d+)", made)}
    assert numbers == set(range(1, 81))


def test_validation_shares_no_package_and_no_record_with_training(written: Path, data: Path) -> None:
    sources = {
        name: {record["source"] for record in lines(written / name)}
        for name in ("prompts.jsonl", "heldout_prompts.jsonl")
    }
    shared = sources["prompts.jsonl"] & sources["heldout_prompts.jsonl"]
    assert shared <= {"synthetic", "mbpp", "aider"}
    assert sources["heldout_prompts.jsonl"] & set(NAMES) == {name for name in NAMES if is_validation(name)} != set()
    training, validation = (
        {int(each) for each in re.findall(r"record(\d+)", json.dumps(list(data_prompts(data, Random(0), flag))))}
        for flag in (False, True)
    )
    assert validation == set(range(81 - VALIDATION_MBPP, 81)) and not training & validation


def test_sources_name_licences_counts_and_reasons(written: Path) -> None:
    about = json.loads((written / "sources.json").read_text())
    assert {each["name"] for each in about["packages"]} == {*NAMES, "vendors"}
    assert {each["licence"] for each in about["packages"]} == {"MIT"}
    assert set(about["refused"]) == {*FORBIDDEN, "copyleft", "unnamed"}
    assert about["refused"]["rich"] == "it is held out" and "GNU" in about["refused"]["copyleft"]
    report = about["files"]["prompts.jsonl"]
    assert report["prompts"] == sum(report["tasks"].values()) == sum(report["sources"].values()) == 300
    assert report["contamination"]["held_out_texts"]["mbpp-last-100"] == 100


def test_contaminated_prompts_are_left_out(tmp_path: Path, data: Path, packages: Path) -> None:
    benchmark = tmp_path / "planted.py"
    benchmark.write_text(unit_of(module("pack3"), "pack3_5").code)
    about = write_prompts(tmp_path / "out", data, packages, SETTINGS, [benchmark])
    assert about["files"]["prompts.jsonl"]["contamination"]["removed_by_benchmark"]["planted"] > 0
    assert "by a factor and sum 5." not in (tmp_path / "out/prompts.jsonl").read_text()


@pytest.mark.parametrize(
    ("metadata", "used"),
    [
        ("License-Expression: BSD-3-Clause AND MIT", True),
        ("License-Expression: Apache-2.0 WITH LLVM-exception", True),
        ("License-Expression: MIT AND LicenseRef-Own", False),
        ("License-Expression: MPL-2.0 AND MIT", False),
        ("License: Apache License 2.0", True),
        ("License: LGPL-2.1", False),
        ("License: All rights reserved", False),
        ("Classifier: License :: OSI Approved :: Python Software Foundation License", True),
        ("Classifier: License :: OSI Approved", False),
    ],
)
def test_licences(tmp_path: Path, metadata: str, used: bool) -> None:
    write_wheel(tmp_path, "some", metadata)
    assert (find_packages(tmp_path)[0].refused == "") == used


def test_installed_and_unpacked_packages_are_read(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "unpacked"):
        name = "flat" if root == tmp_path else "nested"
        (root / f"{name}-1.0.dist-info").mkdir(parents=True)
        (root / f"{name}-1.0.dist-info/METADATA").write_text(f"Name: {name}\nVersion: 1.0\nLicense: MIT\n")
        (root / name).mkdir()
        (root / name / "core.py").write_text(module(name))
    (tmp_path / "flat-1.0.dist-info/RECORD").write_text(
        "flat/core.py,sha256=x,1\nflat/gone.py,,\n../../bin/tool.py,,\n"
    )
    found = find_packages(tmp_path)
    assert [package.name for package in found] == ["flat", "nested"]
    assert [[path for path, _ in package.read(9)] for package in found] == [["flat/core.py"], ["nested/core.py"]]


def test_missing_inputs_are_named(tmp_path: Path, data: Path, packages: Path) -> None:
    with pytest.raises(InputError, match="there is no file"):
        write_prompts(tmp_path, tmp_path / "nothing", packages, SETTINGS)
    with pytest.raises(InputError, match="no package"):
        write_prompts(tmp_path, data, tmp_path / "empty", SETTINGS)


def test_units_are_read_with_their_parts() -> None:
    found = list(units("pack", "pack/core.py", module("pack")))
    assert len(found) == FUNCTIONS + 1 and found[-1].kind == "class"
    unit = found[3]
    assert unit.signature == "def pack_3(values, scale=3):" and unit.arguments == "values, scale=3"
    assert sections(unit.docstring)["returns"] == "float: the scaled sum"
    assert '"""' in unit.code and '"""' not in unit.bare and ast.parse(unit.bare)
    assert assertions(unit) == ["assert pack_3([1, 2]) == 9"]
    assert list(units("pack", "pack/bad.py", "def broken(:")) == []


def test_sections_of_three_styles() -> None:
    numpy_style = "Sum.\n\nParameters\n----------\nx : int\n    One.\n\nReturns\n-------\nint\n    The sum."
    fields = "Sum of :func:`~pack.values`.\n\n:param x: One.\n:returns: The sum."
    assert sections(numpy_style) == {
        "description": "Sum.",
        "parameters": "x : int\n    One.",
        "returns": "int\n    The sum.",
    }
    assert sections(fields) == {
        "description": "Sum of `pack.values`.",
        "parameters": "param x: One.",
        "returns": "The sum.",
    }


def test_a_mutation_changes_the_program_and_parses() -> None:
    code = unit_of(module("pack"), "pack_3").bare
    changed = {mutate(code, Random(seed)) for seed in range(40)}
    assert len(changed) > 3 and code not in changed
    for each in changed - {None}:
        assert ast.dump(ast.parse(str(each))) != ast.dump(ast.parse(code))
    assert mutate("pass", Random(0)) is None


def test_function_prompts_hide_the_body() -> None:
    unit = unit_of(module("pack"), "pack_3")
    for seed in range(60):
        prompt = function(unit, Random(seed))
        assert prompt is not None and "total" not in prompt["messages"][0]["content"]


def test_tool_prompts_have_tools_in_the_request_or_in_the_text() -> None:
    unit = unit_of(module("pack"), "pack_3")
    prompts = [tool(unit, Random(seed)) for seed in range(40)]
    assert {"tools" in prompt for prompt in prompts if prompt} == {True, False}
    for prompt in prompts:
        assert prompt is not None and prompt["messages"][0]["role"] == "system"
        named = [each["function"]["name"] for each in prompt.get("tools", [])]
        assert len(set(named)) == len(named)
        assert named or "<tool_call>" in prompt["messages"][0]["content"]


def test_continuations_leave_the_rest_to_be_written() -> None:
    text = module("pack")
    prompts = [continuation("pack/core.py", text, Random(seed)) for seed in range(40)]
    texts = [prompt["messages"][0]["content"] for prompt in prompts if prompt is not None]
    assert len(texts) > 30
    for each in texts:
        assert "def pack_" in each or "class PackBox" in each
        assert "method_3" not in each and "Copyright" not in each
    assert continuation("pack/short.py", "x = 1\n" * 5, Random(0)) is None


def test_an_update_snippet_has_the_changed_lines_and_markers() -> None:
    before = "\n".join(f"    line {index}" for index in range(20))
    snippet = update_snippet(before, before.replace("line 10", "new"), context=1)
    marker = "    # ... existing code ..."
    assert snippet.split("\n") == [marker, "    line 9", "    new", "    line 11", marker]


def test_synthetic_tasks_have_true_tests_and_parse() -> None:
    random = Random(0)
    for _ in range(300):
        text = short_task(random)
        for line in re.findall(r"^assert .*$", text, flags=re.MULTILINE):
            ast.parse(line)
        code = library_task(random).split("```")[1]
        ast.parse(f"{code.rstrip()}\n    pass")
    sums = re.compile(
        r"the sum of all even numbers in a given list\..*?assert sum_even\((\[.*?\])\) == (-?\d+)", re.DOTALL
    )
    found = [match for _ in range(4000) if (match := sums.search(short_task(random)))]
    assert found
    for given, result in (match.groups() for match in found):
        assert sum(value for value in ast.literal_eval(given) if value % 2 == 0) == int(result)


def test_evaluation_and_study_files(tmp_path: Path, data: Path, packages: Path) -> None:
    assert write_evaluation(tmp_path, data) == {"mbpp_last100": 100, "bigcodebench_hard": 1, "prose": 32}
    texts = [each["messages"][0]["content"] for each in lines(tmp_path / "eval_mbpp_last100.jsonl")]
    assert texts == [mbpp_prompt(mbpp_record(number)) for number in range(81, 181)]
    assert "assert task_81([81, 0]) == 81" in texts[0]
    prose = {each["messages"][0]["content"] for each in lines(tmp_path / "eval_prose.jsonl")}
    assert write_general(tmp_path, data, packages, 20) == len(lines(tmp_path / "general_prompts.jsonl"))
    general = {each["messages"][0]["content"] for each in lines(tmp_path / "general_prompts.jsonl")}
    assert "A question of stem." in general and "A question of coding." not in general
    assert not general & prose
    size = write_generic_text(tmp_path, data, packages, 30_000)
    assert size == sum(len(each["text"].encode()) for each in lines(tmp_path / "generic_text.jsonl")) > 15_000
    assert "rich_" not in (tmp_path / "generic_text.jsonl").read_text()
    assert read_records(tmp_path / "eval_prose.jsonl")[0]["task"] == "prose"
