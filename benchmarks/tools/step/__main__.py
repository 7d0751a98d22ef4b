"""One decode step of a 1.5B model on one GPU, as a CUDA graph of fused kernels, against cuBLAS and torch's own operations.

    python -m benchmarks.tools.step [--layers 28]    the step by (requests, queries), its operations, a prefill of 8,192
    python -m benchmarks.tools.step --tune [FILE]    first times every candidate kernel of each matrix and prints the fastest
    python -m benchmarks.tools.step --polish 65      first tries candidates within the whole step of that many queries

The table of paceline/ops/triton/tuning.py comes from --tune and --polish. The model has the shapes of Qwen2.5-Coder-1.5B with
random bf16 weights. Times are medians of graph replays. An operation is timed by a graph that runs it once per layer on that
layer's weights and cache, so that it reads from memory and not from the L2 cache. Needs CUDA.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from benchmarks.common import argument_parser, finish


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument(
        "--tune", nargs="?", const="", metavar="FILE", help="time the candidates first; write times to FILE"
    )
    parser.add_argument("--polish", type=int, metavar="QUERIES", help="try candidates within the whole step")
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("step needs CUDA")
    # imported here because they need Triton
    from benchmarks.tools.step.measure import measure_prefill, measure_steps
    from benchmarks.tools.step.model import CACHE_ROWS, Model
    from benchmarks.tools.step.tune import compile_share, polish, tune

    torch.manual_seed(0)
    if arguments.compile:
        index, shares = arguments.compile.split("/")
        compile_share(int(index), int(shares), arguments.polish)
        return
    model = Model(arguments.layers, CACHE_ROWS)
    if arguments.tune is not None:
        times = tune(model)
        if arguments.tune:
            Path(arguments.tune).write_text(json.dumps(times, indent=0))
    if arguments.polish is not None:
        polish(model, arguments.polish)
    steps = measure_steps(model)
    prefill = measure_prefill(model)
    finish({"benchmark": "step", "layers": arguments.layers, "steps": steps, "prefill": prefill})


if __name__ == "__main__":
    main()
