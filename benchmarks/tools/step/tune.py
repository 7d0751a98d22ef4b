"""Finds the fastest kernel choices: one matrix alone (`tune`), or within the whole step (`polish`)."""

from __future__ import annotations

import functools
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import ROOT
from benchmarks.tools.step.candidates import (
    ATTENTION,
    BUCKETS,
    MATRICES,
    TILES,
    attention_variants,
    candidates,
    short,
    variants,
    within_step,
)
from benchmarks.tools.step.model import (
    CACHE_ROWS,
    DEVICE,
    DIM,
    EPS,
    HEADS,
    HIDDEN,
    KV_HEADS,
    PAGE,
    SCALE,
    VOCAB,
    Model,
    fused_step,
    random,
    uniform_batch,
)
from benchmarks.tools.step.timing import graph_time
from paceline.ops.attention import AttentionBatch
from paceline.ops.triton import attention, linear, tuning
from paceline.ops.triton.linear import Product
from paceline.ops.triton.tuning import Blas, Choice

PROCESSES = 14  # that compile


def products(model: Model, name: str, tokens: int) -> list[Product]:
    if name == "head":
        return [Product(random(tokens, HIDDEN), model.head, model.norm, EPS)]
    columns = MATRICES[name][2]
    x, residual = random(tokens, columns), random(tokens, HIDDEN)
    calls = []
    for layer in model.layers:
        weight = getattr(layer, name)
        if name in ("o", "down"):
            calls.append(Product(x, weight, eps=EPS, residual=residual, next_norm=layer.norm_2))
        else:
            calls.append(Product(x, weight, layer.norm_1, EPS, gate=name == "gate_up"))
    return calls


def polish(model: Model, tokens: int, context: int = 2000) -> dict[str, Any]:
    """Improves tuning.TABLE for steps of one request with `tokens` queries, matrix by matrix, by the time of the step."""
    compile_in_parallel("--polish", str(tokens))
    ids = torch.randint(0, VOCAB, (tokens,), device=DEVICE)
    step = functools.partial(fused_step, model, ids, uniform_batch(1, tokens, context))
    best = graph_time(step)
    print(f"step of {tokens}: {best:.3f} ms before", flush=True)
    found: dict[str, Any] = {"before": best}
    for name in ("down", "gate_up", "o", "qkv", "head"):
        key = MATRICES[name]
        timed = []
        kept = tuning.TABLE[key]
        for choice in within_step(name, tokens):
            tuning.TABLE[key] = ((tokens, choice), *kept)  # dispatch takes the first row that covers `tokens`
            try:
                timed.append((graph_time(step, 5, 8), choice))
            except Exception as failure:  # a candidate that does not fit the device is left out
                print(f"{name} {choice}: {type(failure).__name__} {str(failure)[:80]}", flush=True)
                torch.cuda.synchronize()
        timed.sort(key=lambda pair: pair[0])
        tuning.TABLE[key] = kept
        if timed and timed[0][0] < best:
            best = timed[0][0]
            before = tuple(row for row in kept if row[0] < tokens)
            tuning.TABLE[key] = (*before, (tokens, timed[0][1]), *kept[len(before) :])
        print(f"{name:8} {best:.3f}  ", "  ".join(f"{t:.3f} {short(choice)}" for t, choice in timed[:5]), flush=True)
        found[name] = [(round(t, 4), short(choice)) for t, choice in timed]
    found["attention"] = polish_attention(step, tokens)
    return found


def polish_attention(step: Callable[[], Any], tokens: int) -> list[tuple[float, tuple[int, int, int, int], int]]:
    """Milliseconds of the step with each tile of attention and number of programs, fastest first; nothing is changed."""
    timed = []
    attend, rows = attention.attend, tokens * HEADS // KV_HEADS
    tiles = [tile for tile in TILES if tile[0] <= max(16, 2 * rows)]
    try:
        for tile in tiles:
            for programs in (132, 264, 528):
                attention.attend = functools.partial(attend, tile=tile, programs=programs)
                timed.append((round(graph_time(step, 5, 8), 4), tile, programs))
    finally:
        attention.attend = attend
    timed.sort()
    print("attention", "  ".join(f"{t:.3f} {tile} {programs}" for t, tile, programs in timed[:5]), flush=True)
    return timed


def compile_in_parallel(*options: str) -> None:
    """Compiles all candidates in processes of their own, since compiling takes longer than timing."""
    command = [sys.executable, "-m", "benchmarks.tools.step", *options, "--compile"]
    workers = [subprocess.Popen([*command, f"{index}/{PROCESSES}"], cwd=ROOT) for index in range(PROCESSES)]
    for worker in workers:
        worker.wait()


def compile_share(index: int, shares: int, tokens: int | None) -> None:
    """Compiles a share of the candidates into Triton's cache by running each once."""
    model = Model(1, CACHE_ROWS)
    if tokens is not None:
        wanted = [(name, tokens, choice) for name in MATRICES for choice in within_step(name, tokens)]
    else:
        wanted = variants()
    for name, count, choice in wanted[index::shares]:
        try:
            linear.run(products(model, name, count)[0], choice)
        except Exception as failure:  # the timing run reports it again
            print(f"{name} {count} {choice}: {type(failure).__name__}", flush=True)
    for workload, tile, programs in [] if tokens is not None else attention_variants()[index::shares]:
        batch = uniform_batch(*workload)
        query = random(workload[0] * workload[1], HEADS, DIM)
        try:
            attention.attend(
                query, model.layers[0].keys, model.layers[0].values, batch, PAGE, SCALE, tile=tile, programs=programs
            )
        except Exception as failure:
            print(f"{workload} {tile}: {type(failure).__name__}", flush=True)
    torch.cuda.synchronize()


def tune(model: Model) -> dict[str, Any]:
    """Times every candidate, puts the fastest into tuning.TABLE for the rest of this run, and returns all times."""
    begin = time.perf_counter()
    compile_in_parallel()
    print(f"compiled {len(variants())} in {time.perf_counter() - begin:.0f} s", flush=True)
    results: dict[str, Any] = {}
    best: dict[str, list[tuple[int, Choice]]] = {name: [] for name in MATRICES}
    for name in MATRICES:
        for tokens, limit in BUCKETS.items():
            timed = []
            calls = products(model, name, tokens)
            for choice in candidates(name, tokens):
                run = functools.partial(run_all, calls, choice)
                try:
                    timed.append((1000 * graph_time(run, 3, 4) / len(calls), choice))
                except Exception as failure:  # a candidate that does not fit the device is left out
                    print(f"{name} {tokens} {choice}: {type(failure).__name__} {str(failure)[:80]}", flush=True)
                    torch.cuda.synchronize()
            timed.sort(key=lambda pair: pair[0])
            best[name].append((limit, timed[0][1]))
            results[f"{name} {tokens}"] = [(round(t, 2), short(choice)) for t, choice in timed]
            blas = next(t for t, choice in timed if isinstance(choice, Blas))
            top = "  ".join(f"{t:.1f} {short(choice)}" for t, choice in timed[:3])
            print(f"{name:8} {tokens:4}  blas {blas:6.1f}  {top}", flush=True)
        operation, rows, columns = MATRICES[name]
        tuning.TABLE[operation, rows, columns] = tuple(best[name])
    for workload in ATTENTION:
        timed_tiles = []
        batch = uniform_batch(*workload)
        query = random(workload[0] * workload[1], HEADS, DIM)
        for _, tile, programs in (v for v in attention_variants() if v[0] == workload):
            try:
                taken = graph_time(functools.partial(attend_all, model, query, batch, tile, programs), 3, 4)
                timed_tiles.append((1000 * taken / len(model.layers), tile, programs))
            except Exception as failure:
                print(f"{workload} {tile}: {type(failure).__name__} {str(failure)[:80]}", flush=True)
        timed_tiles.sort()
        results[f"attention {workload}"] = [(round(t, 2), *tile, programs) for t, tile, programs in timed_tiles]
        print(f"attention {workload}  ", "  ".join(f"{t:.1f} {tile} {n}" for t, tile, n in timed_tiles[:4]), flush=True)
    print(f"tuned in {time.perf_counter() - begin:.0f} s")
    return results


def run_all(calls: list[Product], choice: Choice) -> None:
    for call in calls:
        linear.run(call, choice)


def attend_all(model: Model, query: Tensor, batch: AttentionBatch, tile: Any, programs: int) -> None:
    for layer in model.layers:
        attention.attend(query, layer.keys, layer.values, batch, PAGE, SCALE, tile=tile, programs=programs)
