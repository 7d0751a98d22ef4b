"""Texts beside the training prompts: evaluation prompts, prompts of general chat, and text that no target wrote."""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random

from paceline.errors import InputError
from paceline.train.contamination import HELD_OUT_MBPP, load_held_out, read_records, remove_contaminated
from paceline.train.data_prompts import mbpp_prompt
from paceline.train.package_code import Package, digest, find_packages, sections, units
from paceline.train.package_prompts import user
from paceline.train.prompts import is_validation, write_records

_MT_BENCH, _SPEC_BENCH = "prompts/mt_bench_question.jsonl.gz", "prompts/spec_bench_question.jsonl.gz"
_PROSE = ("writing", "roleplay", "humanities")  # categories of MT-bench
_NUM_SUMMARIES = 30  # of Spec-Bench, in the evaluation of prose
_NO_PROSE = re.compile(r"https?://|@\w|::|^[ |<>`.+=*-]|^\d+\.", re.MULTILINE)  # links, tables, lists, code
_GENERAL = (
    "Summarise this text in two sentences.\n\n{text}",
    "Rewrite this for someone who does not program:\n\n{text}",
    "{text}\n\nWhat are the three main points?",
    "Translate to German:\n\n{text}",
    "Translate to French:\n\n{text}",
    "Write a short blog post about the following.\n\n{text}",
    "Write an email to a colleague that tells them about this:\n\n{text}",
    "Write five questions that this text answers, with the answers.\n\n{text}",
    "Discuss the advantages and disadvantages of what is described here:\n\n{text}",
)


def write_study(
    output: Path, data: Path, packages: Path | None, num_prompts: int, seed: int = 0, benchmarks: Iterable[Path] = ()
) -> dict[str, str]:
    """Writes the files of all functions below to a folder; returns what each file holds, for people, by name.

    `packages` and `num_prompts` are as for `write_prompts`. Raises InputError as those functions do.
    """
    packages, benchmarks = packages or Path(sysconfig.get_paths()["purelib"]), list(benchmarks)
    sizes = {f"eval_{name}.jsonl": f"{count:,} prompts" for name, count in write_evaluation(output, data).items()}
    general = write_general(output, data, packages, num_prompts, seed, benchmarks)
    generic = write_generic_text(output, data, packages, seed=seed, benchmarks=benchmarks)
    return {
        **sizes,
        "general_prompts.jsonl": f"{general:,} prompts",
        "generic_text.jsonl": f"{generic:,} bytes of text",
    }


def write_evaluation(output: Path, data: Path) -> dict[str, int]:
    """Writes eval_mbpp_last100, eval_bigcodebench_hard and eval_prose (.jsonl) to a folder; returns the number of each.

    Lines have "messages" and "task". Raises InputError where a file of the data set is missing.
    """
    mbpp = [mbpp_prompt(record) for record in read_records(data / "prompts/mbpp.jsonl.gz")[-HELD_OUT_MBPP:]]
    hard = [record["instruct_prompt"] for record in read_records(data / "prompts/bigcodebench_hard.json.gz")]
    files = {"mbpp_last100": mbpp, "bigcodebench_hard": hard, "prose": list(_prose(data))}
    for name, texts in files.items():
        write_records(output / f"eval_{name}.jsonl", ({**user(text), "task": name} for text in texts))
    return {name: len(texts) for name, texts in files.items()}


def _prose(data: Path) -> Iterator[str]:
    for record in read_records(data / _MT_BENCH):
        if record["category"] in _PROSE:
            yield record["turns"][0]
    summaries = [each for each in read_records(data / _SPEC_BENCH) if each["category"] == "summarization"]
    for record in summaries[-_NUM_SUMMARIES:]:
        yield record["turns"][0]


def write_general(
    output: Path, data: Path, packages: Path, num_prompts: int, seed: int = 0, benchmarks: Iterable[Path] = ()
) -> int:
    """Writes general_prompts.jsonl, chat without code for the study; returns the number of prompts.

    They are the questions of MT-bench and Spec-Bench that the evaluation of prose leaves, and tasks about the packages'
    documentation. Raises InputError where a file of the data set is missing.
    """
    random = Random(seed)
    used = set(_prose(data))
    records = [each for name in (_MT_BENCH, _SPEC_BENCH) for each in read_records(data / name)]
    texts = [each["turns"][0] for each in records if each["category"] != "coding"]
    chosen = {text: "questions" for text in texts if text not in used}
    passages = [text for text in _passages(packages) if 200 <= len(text) <= 2500]
    random.shuffle(passages)
    for passage in passages[: max(0, num_prompts - len(chosen))]:
        chosen[random.choice(_GENERAL).format(text=passage)] = "documentation"
    found = [{**user(text), "task": "general", "source": source} for text, source in chosen.items()]
    kept, _ = remove_contaminated(found, load_held_out(data, benchmarks))
    random.shuffle(kept)
    write_records(output / "general_prompts.jsonl", kept)
    return len(kept)


def write_generic_text(
    output: Path,
    data: Path,
    packages: Path,
    num_bytes: int = 10_000_000,
    seed: int = 0,
    benchmarks: Iterable[Path] = (),
) -> int:
    """Writes generic_text.jsonl, lines of {"text"}: documentation and source text in equal parts; returns the bytes of text.

    The study trains on it in place of the target's own output. Texts that share 13 words with a held-out text are left out.
    Raises InputError where no package may be used.
    """
    random = Random(seed)
    prose = list(_passages(packages))
    code = [text[:8000] for package in _usable(packages) for _, text in package.read(20) if len(text) > 500]
    if not code:
        raise InputError(f"no package in {packages} has a permissive licence in its metadata")
    held_out = load_held_out(data, benchmarks)
    chosen = []
    for kind in (prose, code):
        random.shuffle(kind)
        kept, _ = remove_contaminated(({"text": text} for text in kind), held_out)
        size = 0
        for record in kept:
            if size < num_bytes // 2:
                chosen.append(record)
                size += len(record["text"].encode("utf-8", "replace"))
    random.shuffle(chosen)
    write_records(output / "generic_text.jsonl", chosen)
    return sum(len(record["text"].encode("utf-8", "replace")) for record in chosen)


def _usable(folder: Path) -> list[Package]:
    return [each for each in find_packages(folder) if not each.refused and not is_validation(each.name)]


def _passages(packages: Path) -> Iterator[str]:
    """READMEs in pieces, and the descriptions in long docstrings; each text once."""
    seen = set()
    for package in _usable(packages):
        paragraphs = [each.strip() for each in package.description.replace("\r\n", "\n").split("\n\n")]
        paragraphs = [each for each in paragraphs if not _NO_PROSE.search(each)]
        texts = ["\n\n".join(paragraphs[index : index + 4]) for index in range(0, len(paragraphs), 4)]
        for path, text in package.read(60):
            texts += [sections(unit.docstring)["description"] for unit in units(package.name, path, text)]
        for text in texts:
            key = digest(text)
            if len(text) > 200 and key not in seen:
                seen.add(key)
                yield text
