"""The time of a decode step by the number of drafted tokens, with a drafter and without one. Needs CUDA.

    python -m benchmarks.tools.drafts [--model NAME] [--drafter joint:PATH] [--batch 1]

Prints milliseconds of a step of `--batch` requests with short contexts for each draft length, as the engine measures them when
it captures its graphs: they are what the chooser goes by. The drafter's own passes are in the time.
"""

from __future__ import annotations

import sys

import torch

from benchmarks.common import MODEL, argument_parser, finish
from benchmarks.speculate import PLAIN, drafting
from paceline.config import EngineConfig
from paceline.engine.engine import Engine


def main() -> None:
    parser = argument_parser(__doc__, MODEL)
    parser.add_argument("--drafter", default=EngineConfig().drafter, help="as in benchmarks.speculate")
    parser.add_argument("--batch", type=int, default=1, help="requests of the step")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("drafts needs CUDA: on a CPU the engine measures steps as they run")
    plain = Engine.load(arguments.model, EngineConfig(max_batch=arguments.batch, drafter=PLAIN))
    engines = {PLAIN: plain, arguments.drafter: plain.sibling(drafting(plain.config, arguments.drafter, None))}
    times = {}
    for name, engine in engines.items():
        engine.warm_up(arguments.batch)
        costs = {each: engine.runner.step_cost(arguments.batch, each) for each in engine.drafter.lengths}
        times[name] = {each: round(1000 * cost, 3) for each, cost in costs.items() if cost < float("inf")}
        print(name, times[name], flush=True)
    finish({"benchmark": "drafts", "model": arguments.model, "batch": arguments.batch, "step_ms": times})


if __name__ == "__main__":
    main()
