"""Paceline, llama.cpp, vLLM and transformers on a CPU, one after another in one run, on the same weights and the same tokens.

    python -m benchmarks.peers --model smollm2-135m --limit 3 --peers paceline,llama,vllm,hf --modes prefill,plain,lookup
    python -m benchmarks.peers --model qwen2.5-coder-1.5b --limit 1

Modes:  prefill  1,024 tokens of code, to the first token
        plain    128 tokens after 256 of code, token by token
        lookup   Fast Apply prompts, with each peer's prompt-lookup drafter at each of its settings

Rates are medians over prompts and rounds; decode rates exclude prefill. Every peer is warmed up first and has its own
environment (venvs.py), its own process and the same bf16 weights (export.py); in the row named quantised llama.cpp runs the
GGUF file as it is. `ratios` are Paceline over the best bf16 peer, each drafter at its best setting. Prompts of `plain` are
shorter than those of `lookup`, so `lookup_over_plain` is rather too low.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import MODEL, ROOT, argument_parser, finish, quantiles
from benchmarks.data.files import load_edits
from benchmarks.peers import venvs
from benchmarks.peers.export import export
from paceline.models.checkpoint import open_checkpoint
from paceline.models.pull import pull
from paceline.models.tokenizer import Tokenizer
from paceline.tasks.apply import prompt_and_draft
from paceline.tasks.merge import candidate_merge
from paceline.tasks.prompts import fence_for, policy_named
from paceline.tasks.snippet import snippet_of

PREFILL_TOKENS, PLAIN_PROMPT, PLAIN_TOKENS = 1024, 256, 128


@dataclass(frozen=True)
class Peer:
    """A row of the table. `program` is its module here, `weights` directory, gguf or source, `sweep` its drafter's settings."""

    label: str
    program: str
    weights: str
    sweep: tuple[dict[str, Any], ...]


PEERS: dict[str, tuple[Peer, ...]] = {
    "paceline": (
        Peer("paceline", "paceline_cpu", "source", ({},)),
        Peer("paceline, candidate", "paceline_cpu", "source", ({},)),
    ),
    "llama": (
        Peer("llama.cpp", "llama", "gguf", tuple({"num_pred_tokens": n} for n in (10, 4, 24, 64))),
        Peer("llama.cpp, quantised", "llama", "source", tuple({"num_pred_tokens": n} for n in (10, 4, 24))),
    ),
    "vllm": (Peer("vLLM", "vllm_cpu", "directory", tuple({"num_speculative_tokens": n} for n in (16, 32, 8, 4, 64))),),
    "hf": (Peer("transformers", "hf", "directory", tuple({"prompt_lookup_num_tokens": n} for n in (10, 4, 24, 64))),),
}
OURS, CANDIDATE = PEERS["paceline"]
QUANTISED = PEERS["llama"][1]
MODES = ("prefill", "plain", "lookup")


@dataclass(frozen=True)
class Work:
    """The input of every peer in one mode. `sources` are candidate merges, for the row named candidate."""

    mode: str
    prompts: list[list[int]]
    sources: list[list[list[int]]]
    max_tokens: int
    stop_tokens: list[int]


def main() -> None:
    options = parse()
    source = pull(options.model)
    weights = export(source)
    models = {"directory": weights.directory, "gguf": weights.gguf, "source": source}
    tokenizer = open_checkpoint(source).tokenizer()
    edits = load_edits(options.edits, longest=1 << 20)
    print(f"{options.model}, {options.threads} threads, load {os.getloadavg()[0]:.2f}")
    rows: list[dict[str, Any]] = []
    for mode in options.modes:
        work = work_of(mode, tokenizer, edits, options)
        print_work(work)
        here: list[dict[str, Any]] = []
        for _ in range(options.rounds):
            for index, (peer, settings) in enumerate(runs(mode, options)):
                row = run(peer, settings, work, models, options.threads)
                print_row(row)
                here[index : index + 1] = [merged(here[index], row) if index < len(here) else row]
        rows += here
    agreement(rows)
    kept = [{name: value for name, value in row.items() if name != "outputs"} for row in rows]
    finish(
        {"benchmark": "peers", "model": options.model, "limit": options.limit, "peer_threads": options.threads}
        | {"ratios": ratios(rows), "rows": kept}
    )
    if any("error" in row for row in rows):
        sys.exit(1)


def parse() -> argparse.Namespace:
    parser = argument_parser(__doc__, MODEL)
    parser.add_argument("--peers", type=some_of(tuple(PEERS)), default=list(PEERS))
    parser.add_argument("--modes", type=some_of(MODES), default=list(MODES))
    parser.add_argument("--edits", type=Path, help="JSON lines with before and after, gzipped or plain")
    parser.add_argument("--limit", type=int, default=4, help="prompts a mode")
    parser.add_argument("--tokens", type=int, default=512, help="most tokens of an output")
    parser.add_argument("--longest", type=int, default=1200, help="most tokens of a file")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--rounds", type=int, default=1, help="times that everything runs, in turns; for a noisy machine"
    )
    parser.add_argument("--sweep", type=int, default=8, help="settings of each drafter to try")
    parser.add_argument(
        "--policy", default="review-margin", help="Fast Apply policy of the lookup prompts (docs/apply.md)"
    )
    return parser.parse_args()


def some_of(known: tuple[str, ...]) -> Any:
    def split(text: str) -> list[str]:
        names = text.split(",")
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(known)}")
        return names

    return split


# ------------------------------------------------------------------------------------------------------ the prompts


def work_of(mode: str, tokenizer: Tokenizer, edits: list[dict[str, Any]], options: argparse.Namespace) -> Work:
    if mode == "lookup":
        return merges(tokenizer, edits, options)
    length, tokens = (PREFILL_TOKENS, 1) if mode == "prefill" else (PLAIN_PROMPT, min(PLAIN_TOKENS, options.tokens))
    prompts = code_prompts(tokenizer, edits, length, options.limit)
    return Work(mode, prompts, [], tokens, [])


def code_prompts(tokenizer: Tokenizer, edits: list[dict[str, Any]], length: int, limit: int) -> list[list[int]]:
    """The beginnings of files with at least `length` tokens, no file twice."""
    files = {edit["path"]: edit["before"] for edit in edits}
    encoded = (tokenizer.encode(text) for text in files.values())
    prompts = [tokens[:length] for tokens in encoded if len(tokens) >= length]
    if not prompts:
        sys.exit(f"none of the edits' files has {length} tokens")
    return evenly(prompts, limit)


def merges(tokenizer: Tokenizer, edits: list[dict[str, Any]], options: argparse.Namespace) -> Work:
    """Fast Apply's prompts, and the candidate merges that Fast Apply drafts from."""
    short = [edit for edit in edits if len(tokenizer.encode(edit["before"])) <= options.longest]
    if not short:
        sys.exit(f"no edit's file is within {options.longest} tokens (--longest)")
    policy = policy_named(options.policy)
    prompts, sources = [], []
    for edit in evenly(short, options.limit):
        code, snippet = edit["before"], snippet_of(edit["before"], edit["after"], edit["path"])
        merge = candidate_merge(code, snippet, edit["path"])
        fence = fence_for(code, snippet, merge.text)
        prompt, source = prompt_and_draft(tokenizer, policy, code, snippet, edit.get("subject", ""), merge, fence)
        prompts.append(prompt)
        sources.append([source])
    return Work("lookup", prompts, sources, options.tokens, list(tokenizer.eos_tokens))


def evenly(values: list[Any], limit: int) -> list[Any]:
    """At most `limit` of them, spread over the whole."""
    count = min(limit, len(values))
    return [values[index * len(values) // count] for index in range(count)]


# --------------------------------------------------------------------------------------------------------- the runs


def runs(mode: str, options: argparse.Namespace) -> Iterator[tuple[Peer, dict[str, Any]]]:
    for name in options.peers:
        for peer in PEERS[name]:
            if mode == "lookup":
                yield from ((peer, settings) for settings in peer.sweep[: options.sweep])
            elif peer is not CANDIDATE:
                yield peer, {}


def run(peer: Peer, settings: dict[str, Any], work: Work, models: dict[str, Path], threads: int) -> dict[str, Any]:
    """One peer's program on one job: its result, or its error."""
    job = {
        "model": str(models[peer.weights]),
        "dtype": "bfloat16",
        "threads": threads,
        "mode": work.mode,
        "prompts": work.prompts,
        "sources": work.sources if peer is CANDIDATE else [],
        "max_tokens": work.max_tokens,
        "stop_tokens": work.stop_tokens,
        "settings": settings,
    }
    return {"label": peer.label, "mode": work.mode, "swept": settings} | answer(peer, job)


def merged(earlier: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """Two rounds' rows as one, with the rates of both; if one failed, that one."""
    if "error" in earlier or "error" in later:
        return earlier if "error" in earlier else later
    both = dict(later)
    for kind in ("prefill", "decode"):
        rates = earlier[f"{kind}_rates"] + later[f"{kind}_rates"]
        both |= {f"{kind}_rates": rates, f"{kind}_tok_s": round(statistics.median(rates), 2) if rates else None}
    return both


def answer(peer: Peer, job: dict[str, Any]) -> dict[str, Any]:
    """The result that the program printed; if it failed, the end of its log."""
    name = next(name for name, variants in PEERS.items() if peer in variants)
    python = Path(sys.executable) if name == "paceline" else venvs.ensure_venv(name)
    with tempfile.TemporaryFile("w+") as errors:
        done = subprocess.run(
            [python, "-m", f"benchmarks.peers.{peer.program}"],
            cwd=ROOT,
            input=json.dumps(job),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=venvs.environment(name, python, job["threads"]),
        )
        if done.returncode == 0:
            result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
            return result
        errors.seek(0)
        said = errors.read().strip().splitlines() or ["nothing"]
        return {"error": f"exit {done.returncode}: {said[-1]}", "stderr": said[-20:]}


# ------------------------------------------------------------------------------------------------------- the figures


def rate(row: dict[str, Any]) -> float:
    """The rate that the row's mode measures; 0 if there is none."""
    return float(row.get("prefill_tok_s" if row["mode"] == "prefill" else "decode_tok_s") or 0.0)


def ratios(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By mode: Paceline, the best bf16 peer, one over the other; and drafted over plain."""
    found: dict[str, Any] = {}
    for mode in MODES:
        here = [row for row in rows if row["mode"] == mode and rate(row)]
        ours = {row["label"]: rate(row) for row in here if row["label"] in (OURS.label, CANDIDATE.label)}
        others = [row for row in here if row["label"] not in (*ours, QUANTISED.label)]
        if not ours or not others:
            continue
        best = max(others, key=rate)
        found[mode] = {
            "paceline": ours,
            "best_peer": {"label": best["label"], "rate": rate(best), "settings": best["settings"]},
            "over_best_peer": {label: round(value / rate(best), 3) for label, value in ours.items()},
        }
    plain = next((rate(row) for row in rows if row["mode"] == "plain" and row["label"] == OURS.label), 0.0)
    if plain:
        names = (OURS.label, CANDIDATE.label)
        drafted = [row for row in rows if row["mode"] == "lookup" and row["label"] in names and rate(row)]
        found["lookup_over_plain"] = {row["label"]: round(rate(row) / plain, 3) for row in drafted}
    return found


def agreement(rows: list[dict[str, Any]]) -> None:
    """Notes in each row, prompt by prompt, how many first tokens are the same as Paceline's.

    The weights are the same but not the rounding, so outputs differ after tokens that are nearly equally likely.
    """
    for mode in MODES:
        here = [row for row in rows if row["mode"] == mode and "outputs" in row]
        ours = [row["outputs"] for row in here if row["label"] == OURS.label]
        for row in here if ours else []:
            row["same_tokens"] = [same(*pair) for pair in zip(row["outputs"], ours[0], strict=True)]


def same(left: list[int], right: list[int]) -> int:
    pairs = enumerate(zip(left, right, strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(left), len(right)))


def print_work(work: Work) -> None:
    lengths = [len(prompt) for prompt in work.prompts]
    median = statistics.median(lengths)
    print(f"\n{work.mode}: {len(lengths)} prompts of {median:.0f} tokens (median), up to {work.max_tokens} tokens each")
    print(f"  {'peer':<22} {'prefill':>9} {'decode':>9} {'low':>8} {'high':>8} {'tokens':>7}  settings", flush=True)


def print_row(row: dict[str, Any]) -> None:
    if "error" in row:
        print(f"  {row['label']:<22} failed: {row['error']}", flush=True)
        return
    rates = quantiles(row["prefill_rates" if row["mode"] == "prefill" else "decode_rates"])
    swept = " ".join(f"{name}={value}" for name, value in row["swept"].items())
    figures = f"{row['prefill_tok_s']:9.1f} {row['decode_tok_s'] or 0:9.1f} {rates['min']:8.1f} {rates['max']:8.1f}"
    print(f"  {row['label']:<22} {figures} {row['tokens']:7}  {swept}", flush=True)


if __name__ == "__main__":
    main()
