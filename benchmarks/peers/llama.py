"""llama.cpp through llama-cpp-python: plain, and with its prompt lookup drafter. Protocol: job.py.

Settings: n_ubatch, flash_attn; for lookup num_pred_tokens, max_ngram_size.
"""

from __future__ import annotations

import time

import llama_cpp
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

from benchmarks.peers.job import Timed, context_needed, read_job, run_job


def main() -> None:
    job = read_job()
    lookup = job["mode"] == "lookup"
    settings = {"n_ubatch": 512, "flash_attn": True} | job["settings"]
    drafter = None
    if lookup:
        settings = {"num_pred_tokens": 10, "max_ngram_size": 2} | settings
        drafter = LlamaPromptLookupDecoding(settings["max_ngram_size"], settings["num_pred_tokens"])
    model = llama_cpp.Llama(
        job["model"],
        n_ctx=context_needed(job, settings.get("num_pred_tokens", 0)),
        n_batch=settings["n_ubatch"],
        n_ubatch=settings["n_ubatch"],
        n_threads=job["threads"],
        n_threads_batch=job["threads"],
        flash_attn=settings["flash_attn"],
        logits_all=lookup,  # a drafter needs the logits of every position, which makes its prefill slower
        draft_model=drafter,
        verbose=False,
    )
    stops = set(job["stop_tokens"])

    def complete(prompt: list[int], max_tokens: int) -> Timed:
        model.reset()
        output: list[int] = []
        marks: list[tuple[float, int]] = []
        start = time.perf_counter()
        for token in model.generate(prompt, temp=0.0, repeat_penalty=1.0):
            output.append(token)
            marks.append((time.perf_counter(), len(output)))
            if len(output) == max_tokens or token in stops:
                break
        return Timed.from_marks(output, start, marks)

    run_job(job, "llama.cpp", f"llama-cpp-python {llama_cpp.__version__}", settings, complete)


if __name__ == "__main__":
    main()
