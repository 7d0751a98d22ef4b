"""Models with a mixture of experts: their configs, their GGUF form, and the engine on them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import torch

from paceline.errors import BadWeights
from paceline.models.checkpoint import open_checkpoint
from paceline.models.config import Experts
from paceline.models.decoder import Decoder
from paceline.models.families import from_gguf, from_hf
from paceline.types import Request, Sampling
from tests.models.test_config import gguf_metadata, values
from tests.tiny import random_tensors, tiny_config, tiny_engine

CPU = torch.device("cpu")
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def test_the_config_of_the_hub_and_of_transformers_5() -> None:
    config = from_hf(values("qwen3_moe", norm_topk_prob=True, **MOE))
    assert config.experts == Experts(8, 2, 24, True, frozenset({0, 1, 2}))
    renamed = {**MOE, "num_local_experts": 8, "num_experts": None}
    assert from_hf(values("qwen3_moe", norm_topk_prob=True, **renamed)) == config
    assert config.qk_norm and not config.attention_bias


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({"decoder_sparse_step": 2}, {1}),
        ({"mlp_only_layers": [0, 2]}, {1}),
        ({"mlp_only_layers": [1], "decoder_sparse_step": 3}, {2}),
        ({"num_experts": 0}, None),
    ],
)
def test_layers_with_a_dense_mlp(changes: dict[str, Any], layers: set[int] | None) -> None:
    experts = from_hf(values("qwen3_moe", **{**MOE, **changes})).experts
    assert (None if experts is None else set(experts.layers)) == layers


@pytest.mark.parametrize(
    "changes",
    [
        {"num_experts": None},
        {"num_experts": "many"},
        {"num_experts_per_tok": 9},
        {"num_experts_per_tok": 0},
        {"moe_intermediate_size": None},
        {"decoder_sparse_step": 0},
        {"mlp_only_layers": 3},
    ],
)
def test_experts_that_no_model_can_have_are_bad_weights(changes: dict[str, Any]) -> None:
    with pytest.raises(BadWeights):
        from_hf(values("qwen3_moe", **{**MOE, **changes}))


def test_gguf_metadata_of_experts() -> None:
    changes = {name.replace("qwen2", "qwen3moe"): value for name, value in gguf_metadata().items()}
    metadata = {**changes, "general.architecture": "qwen3moe", "qwen3moe.expert_count": 8}
    with pytest.raises(BadWeights, match=r"qwen3moe\.expert_used_count"):
        from_gguf(metadata, has_output=True)
    metadata |= {"qwen3moe.expert_used_count": 2, "qwen3moe.expert_feed_forward_length": 24}
    config = from_gguf(metadata, has_output=True)
    assert config.experts == Experts(8, 2, 24, True, frozenset(range(config.num_layers)))


def test_a_gguf_model_comes_back(tmp_path: Path) -> None:
    """Its experts are one tensor of three axes a layer."""
    experts = Experts(6, 2, 64, True, frozenset({0, 1}))
    config = tiny_config("qwen3_moe", vocab_size=16, experts=experts, tie_embeddings=False)
    ours = dict(random_tensors(config))
    kinds = {"gate": "ffn_gate_exps", "up": "ffn_up_exps", "down": "ffn_down_exps"}
    parts = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate": "ffn_gate_inp"}
    parts |= {f"self_attn.{each}_proj": f"attn_{each}" for each in "qkv"} | {"self_attn.o_proj": "attn_output"}
    parts |= {f"self_attn.{each}_norm": f"attn_{each}_norm" for each in "qk"}
    theirs = {
        "token_embd.weight": ours["model.embed_tokens.weight"],
        "output_norm.weight": ours["model.norm.weight"],
        "output.weight": ours["lm_head.weight"],
    }
    for layer in range(2):
        base = f"model.layers.{layer}."
        theirs |= {f"blk.{layer}.{new}.weight": ours[f"{base}{old}.weight"] for old, new in parts.items()}
        for part, name in kinds.items():
            each = [ours[f"{base}mlp.experts.{expert}.{part}_proj.weight"] for expert in range(6)]
            theirs[f"blk.{layer}.{name}.weight"] = torch.stack(each)
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "qwen3moe")
    for add, value in (
        (writer.add_context_length, 256),
        (writer.add_embedding_length, 32),
        (writer.add_block_count, 2),
        (writer.add_feed_forward_length, 64),
        (writer.add_head_count, 4),
        (writer.add_head_count_kv, 2),
        (writer.add_layer_norm_rms_eps, 1e-6),
        (writer.add_expert_count, 6),
        (writer.add_expert_used_count, 2),
        (writer.add_expert_feed_forward_length, 64),
        (writer.add_token_list, [f"w{index}" for index in range(16)]),
    ):
        add(value)
    for name, tensor in theirs.items():
        quantised = gguf.GGMLQuantizationType.Q8_0 if name.endswith("exps.weight") else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(tensor.numpy(), quantised), raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = open_checkpoint(path)
    assert checkpoint.config.experts == experts
    found = dict(checkpoint.tensors(torch.float32))
    assert found.keys() == ours.keys()
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    for name, tensor in ours.items():
        data = tensor.numpy()
        expected = gguf.dequantize(gguf.quantize(data, q8_0), q8_0) if ".experts." in name else data
        assert numpy.array_equal(found[name].numpy(), expected), name
    assert len(Decoder(checkpoint.config, checkpoint.stored(), CPU).layers) == 2


def requests(draw: random.Random, count: int, **settings: Any) -> list[Request]:
    found = []
    for _ in range(count):
        text = [draw.randrange(256) for _ in range(draw.randrange(20, 60))]
        sampling = Sampling(max_tokens=24, ignore_eos=True, **settings)
        found.append(Request(text * 2, sampling, sources=(text,)))
    return found


def test_drafting_changes_no_token() -> None:
    wanted = requests(random.Random(3), 5)
    plain = tiny_engine("qwen3_moe", drafter="none").generate(wanted)
    drafted = tiny_engine("qwen3_moe", fixed_draft=16).generate(wanted)
    assert [each.tokens for each in drafted] == [each.tokens for each in plain]
    assert sum(each.usage.accepted_tokens for each in drafted) > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deterministic_bits_do_not_depend_on_the_batch(dtype: str) -> None:
    wanted = requests(random.Random(4), 3, logprobs=3)
    settings = {"deterministic": True, "dtype": dtype}
    alone = [tiny_engine("qwen3_moe", drafter="none", **settings).generate([each])[0] for each in wanted]
    together = tiny_engine("qwen3_moe", fixed_draft=8, prefill_chunk=16, **settings).generate(wanted)
    for one, other in zip(alone, together, strict=True):
        assert one.tokens == other.tokens and one.logprobs == other.logprobs


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("settings", [{}, {"deterministic": True}, {"cuda_graphs": False}])
def test_on_a_gpu_the_tokens_are_those_of_the_cpu(settings: dict[str, Any]) -> None:
    """In graphs every expert is computed for every token, without them each for its own."""
    shape = {"head_dim": 64, "hidden_size": 256, "intermediate_size": 512}
    wanted = requests(random.Random(5), 6)
    plain = tiny_engine("qwen3_moe", shape=shape, drafter="none").generate(wanted)
    served = tiny_engine("qwen3_moe", shape=shape, device="cuda", fixed_draft=16, **settings)
    assert [each.tokens for each in served.generate(wanted)] == [each.tokens for each in plain]
