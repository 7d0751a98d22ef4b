"""A drafter's card: what it was trained for, on what, and what is accepted of its drafts."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from paceline.train.data_prompts import LICENCES

_SOURCES = "sources.json"
_TITLES = {"eagle3": "An EAGLE-3", "dflash": "A DFlash"}
_EMBEDDED = (
    "kind",
    "target",
    "target_digest",
    "tokens",
    "supervised",
    "epochs",
    "minutes",
    "parameters",
    "draft_vocab_share",
    "settings",
    "data",
    "sources",
    "evaluation",
)
_FAMILIES = ("Apache", "BSD", "ISC", "MIT", "PSF", "Unlicense")
_TEMPERATURE = re.compile(r"t=(.+)")


def keep_sources(prompts: Path, run: Path) -> None:
    """Writes to the folder `run` a summary of the sources.json that lies beside prompts (train/prompts.py), if one does."""
    described = prompts.parent / _SOURCES
    if described.exists() and prompts.parent.resolve() != run.resolve():
        about = json.loads(described.read_text(encoding="utf-8"))
        run.mkdir(parents=True, exist_ok=True)
        summary = summarise(about, prompts.name.removesuffix(".gz"))
        (run / _SOURCES).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def read_sources(folders: Iterable[Path]) -> dict[str, Any] | None:
    """The summary of the first of the folders that has one."""
    for path in (folder / _SOURCES for folder in folders):
        if path.exists():
            return summarise(json.loads(path.read_text(encoding="utf-8")), "prompts.jsonl")
    return None


def summarise(about: dict[str, Any], name: str) -> dict[str, Any]:
    """What a card says of the prompts in the file `name`, from `write_prompts`'s sources.json; what is short stays as it is.

    Packages are counted together; licences are those of the sources, by the prompts that they gave.
    """
    if "files" not in about:
        return about
    report = dict(about["files"].get(name, {}))
    licence_of = {each["name"]: each["licence"] for each in about.get("packages", [])}
    sources: Counter[str] = Counter()
    licences: Counter[str] = Counter()
    packages = [source for source in report.get("sources", {}) if source in licence_of]
    for source, count in report.pop("sources", {}).items():
        sources[f"{len(packages)} packages" if source in licence_of else source] += count
        licences[_family(licence_of.get(source, LICENCES.get(source, "")))] += count
    report |= {"sources": dict(sources.most_common()), "licences": dict(licences.most_common())}
    return report


def _family(licence: str) -> str:
    """A licence's family; several where the metadata names several."""
    text = licence.replace("Python Software Foundation", "PSF")
    found = [each for each in _FAMILIES if re.search(rf"\b{each}", text, re.IGNORECASE)]
    return " and ".join(found) or licence or "none"


def embedded(card: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a card that a drafter's file holds."""
    kept = {name: card[name] for name in _EMBEDDED}
    return {**kept, "data": {name: each for name, each in card["data"].items() if name != "listed"}}


def write_card(run: Path, card: Mapping[str, Any]) -> None:
    """card.json, and card.md for people."""
    (run / "card.json").write_text(json.dumps(dict(card), indent=2) + "\n", encoding="utf-8")
    (run / "card.md").write_text(card_text(card), encoding="utf-8")


def card_text(card: Mapping[str, Any]) -> str:
    """The card as Markdown."""
    data, settings, layer = card["data"], card["settings"], card["config"]["layer"]
    before = f", {card['tokens_before']:,} of them in earlier runs" if card["tokens_before"] else ""
    features = ", ".join(map(str, card["config"]["features"]))
    loss = f"loss {settings['objective']['kind']}, " if card["kind"] == "eagle3" else ""
    lines = [
        f"# {_TITLES[card['kind']]} drafter for {card['target']}",
        "",
        f"- target: {card['target']}, digest `{card['target_digest']}`",
        f"- network: {card['parameters']:,} parameters, {layer['num_layers']} layer{'s' * (layer['num_layers'] > 1)} of "
        f"{layer['hidden_size']:,}, MLP {layer['intermediate_size']:,}; reads the target's states after layers {features}",
        f"- draft vocabulary: {card['draft_vocab_size']:,} tokens, {card['draft_vocab_share']:.2%} of the outputs' tokens",
        f"- seen: {card['tokens']:,} tokens{before}; {card['supervised']:,} of them predicted; {card['epochs']} epochs; "
        f"{card['minutes']} minutes",
        f"- settings of the last run: {loss}learning rate {settings['learning_rate']:g}, {settings['batch_rows']} rows of "
        f"{settings['row_length']:,} tokens a step, {card['options']['steps']} drafted positions, seed {settings['seed']}",
        "",
        "## Data",
        "",
        f"- samples: {data['train']:,} of {data['tokens']:,} tokens, {data['supervised_tokens']:,} of them to predict; "
        f"{data['held_out']:,} held out; {data['cut']:,} cut, {sum(data['dropped'].values()):,} dropped",
        f"- by task: {_counts(data['by_task'])}",
        f"- outputs: {_counts({_variant(name): count for name, count in data['by_variant'].items()})}",
    ]
    lines += [f"- dropped, {reason}: {count:,}" for reason, count in data["dropped"].items()]
    lines += _about_prompts(card.get("sources") or {})
    return "\n".join([*lines, *_acceptance(card.get("evaluation"))]) + "\n"


def _about_prompts(sources: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, title in (("sources", "prompts at hand"), ("licences", "licences of the prompts' sources")):
        if sources.get(name):
            lines.append(f"- {title}: {_counts(sources[name])}")
    checked = sources.get("contamination")
    if checked:
        held_out = ", ".join(checked.get("held_out_texts", {}))
        lines.append(
            f"- contamination: of {checked.get('checked', 0):,} prompts {checked.get('removed', 0):,} were removed, which "
            f"share {checked.get('ngram', 13)} words in a row with a held-out text ({held_out})"
        )
    else:
        lines.append("- contamination: not checked (`paceline train prompts` checks the prompts that it writes)")
    return lines


def _acceptance(result: Mapping[str, Any] | None) -> list[str]:
    if not result:
        return []
    count = len(result["acceptance"])
    lines = [
        "",
        "## Acceptance on held-out samples",
        "",
        "Length: tokens a step, the target's own counted. Then the share of first choices accepted at each drafted position,",
        "given that those before were.",
        "",
        "| task | length | " + " | ".join(str(k + 1) for k in range(count)) + " |",
        "| --- |" + " --- |" * (1 + count),
    ]
    for task, each in {"all": result, **result["by_task"]}.items():
        rates = " | ".join(f"{rate:.3f}" for rate in each["acceptance"])
        lines.append(f"| {task or '-'} | {each['length']:.3f} | {rates} |")
    return lines


def _variant(name: str) -> str:
    found = _TEMPERATURE.fullmatch(name)
    return f"temperature {found[1]}" if found else name or "given"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name or '-'} {count:,}" for name, count in counts.items())
