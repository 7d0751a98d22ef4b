"""The commands `paceline train ...`, `paceline evaluate ...` and `paceline export`.

They join generation by the engine with training, which never import each other.

Commands have more than eight parameters where each is one option of the command line: Typer reads them from the signature.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from paceline.config import EngineConfig
from paceline.errors import InputError
from paceline.interrupts import exiting_on_interrupt

if TYPE_CHECKING:
    from paceline.models.checkpoint import Checkpoint
    from paceline.models.decoder import Decoder
    from paceline.train.generate import Generated
    from paceline.train.run import Target
    from paceline.train.samples import SampleWriter

app = typer.Typer(help="Trains drafters on a model's own output (docs/drafters.md).", no_args_is_help=True)
evaluate_app = typer.Typer(help="Evaluates drafters (docs/drafters.md).", no_args_is_help=True)

Model = Annotated[str, typer.Argument(help="the target: a model's name or path")]
Prompts = Annotated[
    Path, typer.Option(help="lines of {messages} or {prompt}, with an optional task (.jsonl, .jsonl.gz)")
]
Given = Annotated[bool, typer.Option(help="the lines hold the text itself ({text}, or a prompt with its {output})")]
MaxTokens = Annotated[int, typer.Option(help="longest output to a prompt")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto")]
InFlight = Annotated[int | None, typer.Option(help="prompts generated together (default: 256 on CUDA, 8 on CPU)")]


@app.command()
def prompts(
    output: Annotated[Path, typer.Argument(help="the folder to write to")],
    *,
    data: Annotated[Path, typer.Option(help="the data set's folder, which has prompts, edits and traces")],
    packages: Annotated[
        Path | None, typer.Option(help="a folder of wheels or packages (default: this Python's packages)")
    ] = None,
    num: Annotated[int, typer.Option(help="prompts to write")] = 40_000,
    validation: Annotated[int, typer.Option(help="prompts of the same mix that training must not see")] = 500,
    seed: int = 0,
    benchmarks: Annotated[
        list[Path] | None, typer.Option(help="more texts that no prompt may share 13 words with; may be repeated")
    ] = None,
    study: Annotated[
        bool, typer.Option(help="also the study's files: evaluation prompts, general chat, text that no model wrote")
    ] = False,
) -> None:
    """Writes prompts to train on: prompts.jsonl, heldout_prompts.jsonl, and sources.json with licences and contamination."""
    from paceline.train.prompts import PromptSettings, write_prompts
    from paceline.train.study_texts import write_study

    about = write_prompts(output, data, packages, PromptSettings(num, validation, seed), benchmarks or [])
    for name, report in about["files"].items():
        tasks = ", ".join(f"{task} {count:,}" for task, count in report["tasks"].items())
        checked = report["contamination"]
        typer.echo(
            f"{output / name}: {report['prompts']:,} prompts ({tasks}); {checked['removed']:,} of {checked['checked']:,} "
            f"removed, which share {checked['ngram']} words in a row with a held-out text"
        )
    if study:
        for name, size in write_study(output, data, packages, num, seed, benchmarks or []).items():
            typer.echo(f"{output / name}: {size}")


@app.command()
def samples(
    model: Model,
    *,
    prompts: Prompts,
    out: Annotated[Path, typer.Option(help="the file to append to; prompts that it has are skipped")],
    given: Given = False,
    minutes: Annotated[float | None, typer.Option(help="stop after this time")] = None,
    tokens: Annotated[int | None, typer.Option(help="stop after this many tokens of output")] = None,
    max_tokens: MaxTokens = 1024,
    max_context: Annotated[int, typer.Option(help="longest prompt and output together")] = 4096,
    in_flight: InFlight = None,
    device: Device = "auto",
) -> None:
    """Writes samples to train on: the model's own outputs to prompts. Continues where it was killed."""
    from paceline.train.card import keep_sources

    generation = _Generation(given, max_tokens, minutes, tokens, in_flight, max_context, device)
    generation.write(_open(model), prompts, out, [out])
    keep_sources(prompts, out.parent)


@app.command()
def drafter(
    model: Model,
    *,
    prompts: Annotated[
        Path | None,
        typer.Option(help="prompts to generate samples of first (see train samples); not again once training began"),
    ] = None,
    out: Annotated[Path, typer.Option(help="the run's folder; a run that is there continues")],
    minutes: Annotated[float | None, typer.Option(help="stop after this time, generation included")] = None,
    tokens: Annotated[int | None, typer.Option(help="stop at this many tokens seen, over all runs")] = None,
    samples: Annotated[
        list[Path] | None, typer.Option(help="a file of samples to use as well; may be repeated")
    ] = None,
    held_out: Annotated[
        list[Path] | None, typer.Option(help="a file of samples to evaluate on (default: one prompt in twenty)")
    ] = None,
    given: Given = False,
    generate_minutes: Annotated[
        float | None, typer.Option(help="longest generation (default: a third of the minutes)")
    ] = None,
    max_tokens: MaxTokens = 1024,
    in_flight: InFlight = None,
    start: Annotated[
        Path | None,
        typer.Option(
            "--from", help="a trained drafter to go on from: its weights, draft vocabulary and count of tokens"
        ),
    ] = None,
    kind: Annotated[str, typer.Option(help="eagle3, or dflash: a block in one pass")] = "eagle3",
    draft_vocab: Annotated[
        int | None, typer.Option(help="tokens that can be drafted (default: 16384, or the --from drafter's)")
    ] = None,
    intermediate: Annotated[
        int | None, typer.Option(help="width of its MLP (default: the target's, or the --from drafter's)")
    ] = None,
    unroll: Annotated[int, typer.Option(help="drafted positions to train for; dflash: tokens of a block")] = 7,
    layers: Annotated[int, typer.Option(help="dflash: its layers")] = 2,
    markov_rank: Annotated[int, typer.Option(help="dflash: rank of the bias by the token before; 0: no heads")] = 128,
    kv_heads: Annotated[
        int | None, typer.Option(help="dflash: heads of keys and values (default: half a state's width)")
    ] = None,
    loss: Annotated[str, typer.Option(help="eagle3: kl, tv, lk or ce (train/losses.py)")] = "kl",
    lr: Annotated[
        float | None, typer.Option(help="the highest learning rate (default: the optimizer's usual one)")
    ] = None,
    optimizer: Annotated[
        str, typer.Option(help="muon for the layers' matrices and adamw for the rest, or adamw for all")
    ] = "muon",
    batch_rows: Annotated[int, typer.Option(help="rows in a step of the optimizer")] = 4,
    micro_rows: Annotated[
        int,
        typer.Option(help="rows on a device at a time: sets the memory (and the mean in the loss lk and in dflash's)"),
    ] = 4,
    row_length: Annotated[int, typer.Option(help="tokens of a row; samples are cut to it")] = 2048,
    seed: int = 0,
    device: Device = "auto",
) -> None:
    """Trains a drafter for a model: generates samples where prompts are given, then trains. Continues a killed run.

    A run that has begun to train keeps its samples: it generates no more of them.

    With --from it goes on from a trained drafter's weights in a new folder; the optimizer and the schedule begin anew.

    Under torchrun (torchrun --nproc-per-node N -m paceline train drafter ...) each process generates and trains a part.
    """
    from paceline.train.card import keep_sources
    from paceline.train.losses import Objective
    from paceline.train.optimizer import OPTIMIZERS
    from paceline.train.parallel import Group
    from paceline.train.run import DrafterOptions, TrainingRun, check_run, read_start
    from paceline.train.trainer import TrainSettings

    started = time.monotonic()
    rate = OPTIMIZERS.get(optimizer, 0.0) if lr is None else lr  # TrainSettings refuses an unknown optimizer
    settings = TrainSettings(
        tokens, minutes, batch_rows, micro_rows, row_length, rate, optimizer, seed=seed, objective=Objective(loss)
    )
    options = DrafterOptions(kind, draft_vocab, intermediate, unroll, layers, markov_rank, kv_heads)
    group = Group.join()
    checkpoint = _open(model)
    check_run(checkpoint.config, options, settings, group.size, [*(samples or []), *(held_out or [])])
    begun = (out / "state.pt").exists()
    if start is not None and not begun:
        read_start(start, checkpoint.config, _digests(checkpoint), options)
    if prompts is None or begun:
        if prompts is not None:
            _show(f"{out} has begun to train: its samples stay as they are")
        trained = _load(checkpoint, device)
    else:
        limit = generate_minutes if generate_minutes is not None or minutes is None else minutes / 3
        generation = _Generation(given, max_tokens, limit, None, in_flight, row_length, device)
        own = out / (f"samples-{group.rank}.bin" if group.size > 1 else "samples.bin")
        done = sorted(out.glob("samples*.bin"))
        group.agree([0])  # every process has listed the files before one of them grows
        trained = generation.write(checkpoint, prompts, own, done, group.rank, group.size)
        if group.rank == 0:
            keep_sources(prompts, out)
    group.agree([0])  # every process has written its samples
    if minutes is not None:
        (spent,) = group.agree([(time.monotonic() - started) / 60])
        settings = dataclasses.replace(settings, minutes=max(0.1, minutes - spent))
    target = _target(checkpoint, trained, model)
    files = [*sorted(out.glob("samples*.bin")), *(samples or [])]
    card = TrainingRun(out, target, options, settings, group, start).train(files, held_out or [])
    if group.rank == 0:
        found = card["evaluation"]
        accepted = f"{found['length']} tokens a step on held-out samples" if found else "nothing held out"
        typer.echo(f"{out}: {card['tokens']:,} tokens seen, {accepted}")
    group.leave()


@evaluate_app.command("drafter")
def evaluate_drafter(
    drafter: Annotated[
        Path, typer.Argument(help="a trained drafter: a .safetensors file, or a folder of SGLang's or vLLM's")
    ],
    *,
    model: Annotated[str, typer.Option(help="the target: a model's name or path")],
    samples: Annotated[list[Path] | None, typer.Option(help="a file of samples; may be repeated")] = None,
    prompts: Annotated[Path | None, typer.Option(help="prompts to generate samples of (see train samples)")] = None,
    given: Given = False,
    held_out: Annotated[
        bool, typer.Option(help="only the samples that training holds out, one prompt in twenty")
    ] = False,
    max_tokens: MaxTokens = 512,
    in_flight: InFlight = None,
    unroll: Annotated[int, typer.Option(min=1, help="drafted positions; a block drafter has its own number")] = 7,
    row_length: Annotated[int, typer.Option(help="tokens of a row; samples are cut to it")] = 2048,
    force: Annotated[bool, typer.Option(help="evaluate a drafter that was trained for other weights too")] = False,
    device: Device = "auto",
) -> None:
    """Prints a drafter's acceptance over its target's outputs, by drafted position and task; the last line is JSON.

    It compares first choices along the text, as training does on held-out samples; the engine drafts nothing. Speed and what
    an engine accepts are measured by benchmarks/speculate.py.
    """
    from paceline.drafters.checkpoint import check_target, read_checkpoint
    from paceline.train.evaluate import evaluate, table
    from paceline.train.run import check_row_length
    from paceline.train.samples import read_about, read_samples

    if not samples and prompts is None:
        raise InputError("nothing to evaluate on: give --samples, --prompts or both")
    checkpoint, files = _open(model), list(samples or [])
    found = read_checkpoint(drafter, checkpoint.config.num_layers)
    identity, vocabulary = _digests(checkpoint)
    check_target(found, checkpoint.config, identity, force, vocabulary)  # all before anything is generated
    check_row_length(row_length, checkpoint.config)
    for file in files:
        read_about(file)
    with tempfile.TemporaryDirectory() as folder:
        if prompts is None:
            loaded = _load(checkpoint, device)
        else:
            files.append(Path(folder) / "samples.bin")
            generation = _Generation(given, max_tokens, None, None, in_flight, row_length, device)
            loaded = generation.write(checkpoint, prompts, files[-1], [])
        texts = [each for file in files for each in read_samples(file) if each.held_out or not held_out]
    target = _target(checkpoint, loaded, model)
    result = evaluate(found, target, texts, steps=unroll, row_length=row_length, force=force)
    typer.echo(table(result))
    typer.echo(json.dumps({"drafter": str(drafter), "model": model, **result}))


def export(
    drafter: Annotated[Path, typer.Argument(help="a trained drafter: a .safetensors file or a folder")],
    out: Annotated[Path, typer.Argument(help="the folder to write; the file, in the format paceline")],
    *,
    model: Annotated[str, typer.Option(help="the target: a model's name or path")],
    format: Annotated[str, typer.Option(help="sglang, vllm, or paceline: one file in fp8")],
    target_name: Annotated[
        str,
        typer.Option(help="what the folder names as the target, vLLM's verifier (default: as on the drafter's card)"),
    ] = "",
    force: Annotated[bool, typer.Option(help="export a drafter that was trained for other weights too")] = False,
) -> None:
    """Writes a drafter as SGLang or vLLM read it, or as one small file for Paceline (docs/drafters.md)."""
    from paceline.train.export import export_drafter

    typer.echo(export_drafter(drafter, _open(model), format, out, target_name=target_name, force=force))


@dataclasses.dataclass(frozen=True)
class _Generation:
    """How `write` makes samples; the fields are options of the commands."""

    given: bool
    max_tokens: int
    minutes: float | None
    tokens: int | None
    in_flight: int | None
    max_context: int
    device: str

    def write(
        self, checkpoint: Checkpoint, prompts: Path, out: Path, done: list[Path], rank: int = 0, size: int = 1
    ) -> Decoder:
        """Appends to `out` the samples of this rank's prompts that none of `done` has. Returns the target's model."""
        from paceline.train.generate import read_prompts, write_given
        from paceline.train.samples import SampleWriter, keys_in

        lines = read_prompts(prompts)[rank::size]
        about = {"target": checkpoint.identity}
        keys = set().union(*(keys_in(file) for file in done))
        with SampleWriter(out, about) as writer:
            if self.given:
                tokenizer = checkpoint.tokenizer()
                result = write_given(tokenizer, lines, writer, keys, self.max_context, tokenizer.eos_tokens)
                trained = _load(checkpoint, self.device)
            else:
                result, trained = self._generated(checkpoint, lines, writer, keys)
        _show(f"{out}: {result.prompts:,} prompts, {result.tokens:,} tokens; {result.skipped:,} were there already")
        for reason, count in result.bad.items():
            _show(f"left out: {count:,} prompts, each {reason} (lines {', '.join(map(str, result.listed[reason]))})")
        if _on_gpu(self.device):
            import torch

            gc.collect()  # the engine, its cache and its graphs
            torch.cuda.empty_cache()
        return trained

    def _generated(
        self, checkpoint: Checkpoint, lines: list[Any], writer: SampleWriter, keys: set[bytes]
    ) -> tuple[Generated, Decoder]:
        from paceline.engine.engine import Engine
        from paceline.train.generate import GenerateSettings, generate

        on_gpu = _on_gpu(self.device)
        in_flight = self.in_flight or (256 if on_gpu else 8)
        context = min(self.max_context, checkpoint.config.max_positions)
        drafter = "none" if on_gpu else "auto"  # a full batch on a GPU has no room for drafts
        config = EngineConfig(device=self.device, drafter=drafter, max_batch=in_flight, max_context=context)
        engine = Engine.from_checkpoint(checkpoint, config)
        if on_gpu:
            engine.warm_up(in_flight)
        settings = GenerateSettings(self.max_tokens, in_flight=in_flight, minutes=self.minutes, tokens=self.tokens)
        result = generate(engine, engine.tokenizer, lines, writer, keys, settings, _show)
        return result, cast("Decoder", engine.model)


def _open(model: str) -> Checkpoint:
    from paceline.cli import pull_with_progress

    with exiting_on_interrupt():
        from paceline.models.checkpoint import open_checkpoint
    return open_checkpoint(pull_with_progress(model))


def _target(checkpoint: Checkpoint, model: Decoder, name: str) -> Target:
    from paceline.train.run import Target

    identity, vocabulary = _digests(checkpoint)
    return Target(model, Path(name).name, identity, checkpoint.tokenizer().eos_tokens, vocabulary)


def _digests(checkpoint: Checkpoint) -> tuple[str, str]:
    """`Target.digests`."""
    from paceline.drafters.checkpoint import vocabulary_digest

    return checkpoint.identity, vocabulary_digest(checkpoint.tokenizer())


def _load(checkpoint: Checkpoint, device: str) -> Decoder:
    """The target without an engine."""
    import torch

    from paceline.config import Hardware, resolve
    from paceline.models.decoder import Decoder

    config = resolve(EngineConfig(device=device), Hardware.detect(), checkpoint.config.max_positions)
    if config.device == "cpu":
        torch.set_num_threads(config.threads)
    return Decoder(checkpoint.config, checkpoint.stored(), torch.device(config.device), getattr(torch, config.dtype))


def _on_gpu(device: str) -> bool:
    from paceline.config import Hardware

    return device != "cpu" and Hardware.detect().cuda


def _show(line: str) -> None:
    typer.echo(line, err=True)
