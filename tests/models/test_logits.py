"""Logits equal those of transformers, for random models of every family and for real weights out of a GGUF file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from paceline.config import EngineConfig, Hardware, resolve
from paceline.engine.engine import Engine
from paceline.errors import BadWeights
from paceline.kv.cache import KVCache
from paceline.models.checkpoint import Checkpoint, open_checkpoint
from paceline.models.decoder import Decoder
from paceline.models.pull import pull
from paceline.ops.attention import AttentionBatch
from paceline.types import Request, Sampling
from tests.tiny import ByteTokenizer

TOLERANCE = 2e-4  # largest difference of two float32 logits, in parts of the largest logit
PAGE = 8
CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {
    "vocab_size": 258,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 257,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {"original_max_position_embeddings": 1500}  # long enough that some frequencies are kept as they are
MOE = {"head_dim": 16, "num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "llama one head a group": ("Llama", {"num_key_value_heads": 6}),
    "llama one group": ("Llama", {"num_key_value_heads": 1}),
    "llama own head_dim": ("Llama", {"head_dim": 16}),
    "llama llama3": ("Llama", {"rope_parameters": {"rope_theta": 10000.0, **LLAMA3}}),
    "llama linear": ("Llama", {"rope_parameters": {"rope_theta": 500.0, "rope_type": "linear", "factor": 3.0}}),
    "llama yarn": ("Llama", {"rope_parameters": {"rope_theta": 10000.0, **YARN}}),
    "llama yarn long": ("Llama", {"rope_parameters": {"rope_theta": 10000.0, **YARN, **LONG}, "head_dim": 16}),
    "llama yarn set factor": (
        "Llama",
        {
            "rope_parameters": {
                "rope_theta": 100.0,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
                "attention_factor": 1.3,
                **YARN,
            }
        },
    ),
    "qwen2": ("Qwen2", {"rms_norm_eps": 1e-5}),
    "qwen2 tied": (
        "Qwen2",
        {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
    ),
    "qwen3": ("Qwen3", {"head_dim": 20}),
    "qwen3 tied": ("Qwen3", {"head_dim": 12, "tie_word_embeddings": True, "num_key_value_heads": 3}),
    "moe": ("Qwen3Moe", {**MOE, "norm_topk_prob": True}),
    "moe some layers dense": ("Qwen3Moe", {**MOE, "mlp_only_layers": [1]}),
    "moe every second layer": ("Qwen3Moe", {**MOE, "decoder_sparse_step": 2, "tie_word_embeddings": True}),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Products this small are slower on many threads, much slower where others use the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def reference(kind: str, **changes: Any) -> Any:
    """A random model of transformers, its norms and biases random too, so that a forgotten one shows."""
    config = getattr(transformers, f"{kind}Config")(**{**SHAPE, **changes})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    draw = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=draw)
            if weight.dim() == 1:
                weight.copy_(noise * 0.3 + (0.0 if name.endswith("bias") else 1.0))
            else:
                weight.copy_(noise * 1.5 / math.sqrt(weight.shape[-1]))
    return model


def decoder(checkpoint: Checkpoint, positions: int = 512) -> Decoder:
    model = Decoder(checkpoint.config, checkpoint.tensors(torch.float32), CPU)
    model.prepare(positions)
    return model


def new_cache(model: Decoder, tokens: int) -> KVCache:
    return KVCache(model.layout(PAGE), 2 * (tokens // PAGE + 2), 1, CPU)


@torch.inference_mode()
def run(model: Decoder, tokens: list[int], cuts: list[int] | None = None, rows: Any = None) -> torch.Tensor:
    """The logits of all tokens, computed in chunks of the given sizes; the pages lie scattered and back to front."""
    cache = new_cache(model, len(tokens))
    pages = torch.arange(2 * (len(tokens) // PAGE + 1), 0, -2)
    positions = torch.arange(len(tokens))
    locations = pages[positions // PAGE] * PAGE + positions % PAGE
    found, first = [], 0
    for size in cuts or [len(tokens)]:
        last = first + size
        batch = AttentionBatch(
            positions=positions[first:last],
            locations=locations[first:last],
            page_table=pages[None].to(torch.int32),
            context_lens=torch.tensor([first], dtype=torch.int32),
            query_starts=torch.tensor([0, size], dtype=torch.int32),
            branch_starts=torch.zeros(size, dtype=torch.int32),
            max_query=size,
            max_context=first,
        )
        found.append(model.forward(torch.tensor(tokens[first:last]), cache, batch, rows).logits)
        first = last
    return torch.cat(found)


def assert_near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape
    scale = wanted.abs().max().item()
    assert scale > 0.5, "the reference's logits say nothing"
    difference = (found - wanted).abs().max().item()
    assert difference < TOLERANCE * scale, f"differ by {difference:.2e} of {scale:.2f}"


def prompt(length: int, vocabulary: int = 257) -> list[int]:
    return torch.randint(0, vocabulary, (length,), generator=torch.Generator().manual_seed(length)).tolist()


@torch.inference_mode()
def wanted(model: Any, tokens: list[int]) -> torch.Tensor:
    logits: torch.Tensor = model(torch.tensor([tokens])).logits[0]
    return logits


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    kind, changes = MODELS[name]
    theirs = reference(kind, **changes)
    theirs.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config.tie_embeddings == changes.get("tie_word_embeddings", False)
    ours = decoder(checkpoint)
    tokens = prompt(150)
    expected = wanted(theirs, tokens)
    assert_near(run(ours, tokens), expected)
    assert_near(run(ours, tokens, [1, 7, 8, 9, 50, 1, 1, 73]), expected)


def test_the_form_of_transformers_4_loads_too(tmp_path: Path) -> None:
    theirs = reference("Llama", rope_parameters={"rope_theta": 700.0, **LLAMA3})
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    del values["rope_parameters"]
    file.write_text(json.dumps({**values, "rope_theta": 700.0, "rope_scaling": LLAMA3}))
    tokens = prompt(100)
    assert_near(run(decoder(open_checkpoint(tmp_path)), tokens), wanted(theirs, tokens))


@pytest.mark.parametrize(
    "extra", [{"mscale": 0.7, "mscale_all_dim": 1.4}, {"attention_factor": 1.3}, {"truncate": False}]
)
def test_every_yarn_setting_counts(extra: dict[str, Any], tmp_path: Path) -> None:
    theirs = reference("Llama", rope_parameters={"rope_theta": 10000.0, **YARN, **extra})
    theirs.save_pretrained(tmp_path)
    tokens = prompt(100)
    assert_near(run(decoder(open_checkpoint(tmp_path)), tokens), wanted(theirs, tokens))


def test_several_files_are_one_model(tmp_path: Path) -> None:
    theirs = reference("Qwen2")
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    tokens = prompt(40)
    assert_near(run(decoder(open_checkpoint(tmp_path)), tokens), wanted(theirs, tokens))


def test_two_requests_in_one_pass_do_not_see_each_other(tmp_path: Path) -> None:
    theirs = reference("Qwen3", head_dim=16)
    theirs.save_pretrained(tmp_path)
    ours = decoder(open_checkpoint(tmp_path))
    one, other = prompt(21), prompt(13)
    cache = new_cache(ours, 64)
    batch = AttentionBatch(
        positions=torch.cat([torch.arange(21), torch.arange(13)]),
        locations=torch.cat([PAGE + torch.arange(21), 5 * PAGE + torch.arange(13)]),
        page_table=torch.tensor([[1, 2, 3], [5, 6, 0]], dtype=torch.int32),
        context_lens=torch.zeros(2, dtype=torch.int32),
        query_starts=torch.tensor([0, 21, 34], dtype=torch.int32),
        branch_starts=torch.zeros(34, dtype=torch.int32),
        max_query=21,
        max_context=0,
    )
    with torch.inference_mode():
        found = ours.forward(torch.tensor([*one, *other]), cache, batch).logits
    assert_near(found[:21], wanted(theirs, one))
    assert_near(found[21:], wanted(theirs, other))


def test_chosen_rows_are_those_rows(tmp_path: Path) -> None:
    reference("Qwen2").save_pretrained(tmp_path)
    ours = decoder(open_checkpoint(tmp_path))
    tokens = prompt(30)
    whole = run(ours, tokens)
    torch.testing.assert_close(run(ours, tokens, rows=torch.tensor([3, 29])), whole[[3, 29]], atol=1e-4, rtol=1e-4)
    assert run(ours, tokens, rows=torch.tensor([], dtype=torch.int64)).shape == (0, 258)


def test_keys_and_values_are_written_where_no_row_is_wanted(tmp_path: Path) -> None:
    """A prefill chunk that asks for no logits leaves the same cache as one that asks for all."""
    reference("Qwen3", head_dim=16).save_pretrained(tmp_path)
    ours = decoder(open_checkpoint(tmp_path))
    caches = []
    for rows in (None, torch.tensor([], dtype=torch.int64)):
        cache = new_cache(ours, 16)
        batch = AttentionBatch(
            positions=torch.arange(16),
            locations=PAGE + torch.arange(16),
            page_table=torch.tensor([[1, 2]], dtype=torch.int32),
            context_lens=torch.zeros(1, dtype=torch.int32),
            query_starts=torch.tensor([0, 16], dtype=torch.int32),
            branch_starts=torch.zeros(16, dtype=torch.int32),
            max_query=16,
            max_context=0,
        )
        with torch.inference_mode():
            ours.forward(torch.tensor(prompt(16)), cache, batch, rows)
        planes = [cache.plane(name, layer) for layer in range(3) for name in ("keys", "values")]
        caches.append(torch.stack(planes))
    assert caches[0][:, PAGE : 3 * PAGE].abs().amin() > 0
    assert torch.equal(caches[0], caches[1])


@pytest.mark.parametrize("settings", [{"drafter": "none", "prefill_chunk": 7}, {"fixed_draft": 16}])
def test_the_engines_tokens_and_logprobs_equal_transformers(settings: dict[str, Any], tmp_path: Path) -> None:
    theirs = reference("Qwen2", tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    model = Decoder(checkpoint.config, checkpoint.tensors(torch.float32), CPU)
    config = EngineConfig(device="cpu", dtype="float32", max_context=256, cache_tokens=1024, threads=1, **settings)
    engine = Engine(model, ByteTokenizer(), resolve(config, Hardware(False, 1, 1 << 30), 512))  # type: ignore[arg-type]
    tokens = prompt(30)
    done = engine.generate([Request(tokens, Sampling(max_tokens=40, logprobs=20, ignore_eos=True))])[0]
    logits = wanted(theirs, tokens + done.tokens)[len(tokens) - 1 : -1]
    assert done.tokens == logits.argmax(-1).tolist()
    expected, scale = logits.log_softmax(-1), logits.abs().max().item()
    for row, each in zip(expected, done.logprobs, strict=True):
        assert len(each.top) == 20
        for (token, value), best in zip(each.top, row.topk(20).values.tolist(), strict=True):
            assert abs(value - best) < 2 * TOLERANCE * scale
            assert abs(value - row[token].item()) < 2 * TOLERANCE * scale


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_missing_tensor_is_named(name: str, tmp_path: Path) -> None:
    rewritten(tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(BadWeights, match=name):
        decoder(open_checkpoint(tmp_path))


def test_a_tensor_without_a_place_is_named(tmp_path: Path) -> None:
    rewritten(tmp_path, lambda tensors: tensors.update({"model.layers.0.mlp.router.weight": torch.zeros(3)}))
    with pytest.raises(BadWeights, match=r"mlp\.router\.weight"):
        decoder(open_checkpoint(tmp_path))


def test_harmless_leftovers_are_let_by(tmp_path: Path) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    rewritten(tmp_path, lambda tensors: tensors.update(extra))
    assert len(decoder(open_checkpoint(tmp_path)).layers) == 3


def rewritten(path: Path, change: Any) -> None:
    reference("Llama").save_pretrained(path)
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.mark.model
def test_real_weights_from_gguf_equal_transformers() -> None:
    checkpoint = open_checkpoint(pull("smollm2-135m"))
    config = checkpoint.config
    weights = dict(checkpoint.tensors(torch.float32))
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                num_key_value_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                max_position_embeddings=config.max_positions,
                rms_norm_eps=config.rms_norm_eps,
                rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
                tie_word_embeddings=config.tie_embeddings,
            )
        )
    theirs.load_state_dict(weights, strict=False, assign=True)
    theirs.tie_weights()
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config)
    theirs.eval()
    assert not any(each.is_meta for each in [*theirs.parameters(), *theirs.buffers()])
    ours = Decoder(config, weights.items(), CPU)
    ours.prepare(256)
    text = "def fibonacci(n):\n    if n < 2:\n        return n\n    return"
    tokens = checkpoint.tokenizer().encode(text)
    assert_near(run(ours, tokens, [5, len(tokens) - 5])[-1], wanted(theirs, tokens)[-1])
    settings = EngineConfig(device="cpu", dtype="float32", max_context=256, cache_tokens=512, drafter="none")
    engine = Engine(ours, checkpoint.tokenizer(), resolve(settings, Hardware.detect(), config.max_positions))
    done = engine.generate([Request(tokens, Sampling(max_tokens=20, ignore_eos=True))])[0]
    logits = wanted(theirs, tokens + done.tokens)
    assert logits[len(tokens) - 1 : -1].argmax(-1).tolist() == done.tokens
    assert "fibonacci(n" in done.text
