"""Hugging Face transformers: plain generation, and assisted by prompt lookup. Protocol: job.py.

Settings, for lookup: prompt_lookup_num_tokens, max_matching_ngram_size.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import transformers
from transformers.generation.streamers import BaseStreamer

from benchmarks.peers.job import Timed, read_job, run_job


class Clock(BaseStreamer):
    """Notes when tokens arrive; the first call has the prompt."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, int]] = []
        self._seen = -1

    def put(self, value: torch.Tensor) -> None:
        if self._seen < 0:
            self._seen = 0
            return
        self._seen += value.numel()
        self.marks.append((time.perf_counter(), self._seen))

    def end(self) -> None:
        pass


def main() -> None:
    job = read_job()
    torch.set_num_threads(job["threads"])
    options: dict[str, Any] = {}
    if job["mode"] == "lookup":
        options = {"prompt_lookup_num_tokens": 10, "max_matching_ngram_size": 2} | job["settings"]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=getattr(torch, job["dtype"]), attn_implementation="sdpa"
    )
    model.eval()
    model.generation_config.eos_token_id = job["stop_tokens"] or None

    @torch.inference_mode()
    def complete(prompt: list[int], max_tokens: int) -> Timed:
        clock = Clock()
        tokens = torch.tensor([prompt])
        start = time.perf_counter()
        result = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=max_tokens,
            pad_token_id=0,
            streamer=clock,
            **options,
        )
        return Timed.from_marks(result[0, len(prompt) :].tolist(), start, clock.marks)

    version = f"transformers {transformers.__version__}, torch {torch.__version__}"
    run_job(job, "transformers", version, options, complete)


if __name__ == "__main__":
    main()
