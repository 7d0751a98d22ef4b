"""A quick measure of an engine's prefill and plain decode rate."""

from __future__ import annotations

import random
from typing import Any

import torch

from paceline.engine.engine import Engine
from paceline.types import Request, Sampling


def measure(engine: Engine, prompt_tokens: int, output_tokens: int, batch: int) -> dict[str, Any]:
    """Tokens a second of prefill (all prompts) and decode (all requests together), after one warm-up run."""
    draw = random.Random(0)
    limit = engine.model.config.vocab_size

    def requests() -> list[Request]:
        sampling = Sampling(max_tokens=output_tokens, ignore_eos=True)
        return [Request([draw.randrange(limit) for _ in range(prompt_tokens)], sampling) for _ in range(batch)]

    engine.generate(requests()[:1])
    completions = [each.checked() for each in engine.generate(requests())]
    prefill = max(each.usage.prefill_seconds for each in completions)
    decode = max(each.usage.decode_seconds for each in completions)
    return {
        "device": str(engine.model.device),
        "dtype": str(engine.model.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "batch": batch,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "prefill_tokens_per_second": round(batch * prompt_tokens / prefill, 1),
        "decode_tokens_per_second": round(batch * (output_tokens - 1) / decode, 1),
    }
