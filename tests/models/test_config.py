"""config.json of both generations of transformers gives one ModelConfig; what cannot be computed is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from paceline.errors import BadWeights, UnknownArchitecture, UnknownModel
from paceline.models.checkpoint import open_checkpoint
from paceline.models.families import FAMILIES, from_gguf, from_hf
from paceline.models.rope import rope_table
from tests.tiny import tiny_config


def values(family: str = "llama", **changes: Any) -> dict[str, Any]:
    """A small config.json without any RoPE key; a change to None leaves the key out."""
    names = {each.name: each.architecture for each in FAMILIES}
    base: dict[str, Any] = {
        "architectures": [names[family]],
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "vocab_size": 200,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 1024,
        "hidden_act": "silu",
        "eos_token_id": 7,
        "bos_token_id": 1,
    }
    return {key: value for key, value in {**base, **changes}.items() if value is not None}


def test_shapes_and_constants() -> None:
    config = from_hf(values())
    assert (config.hidden_size, config.num_layers, config.num_heads, config.num_kv_heads) == (64, 3, 4, 2)
    assert (config.head_dim, config.intermediate_size, config.vocab_size) == (16, 96, 200)
    assert (config.rms_norm_eps, config.max_positions, config.eos_tokens, config.bos_token) == (1e-5, 1024, (7,), 1)
    assert config.rope_theta == 10000.0 and config.rope_scaling is None and not config.tie_embeddings


@pytest.mark.parametrize(
    ("family", "bias", "norm"), [("llama", False, False), ("qwen2", True, False), ("qwen3", False, True)]
)
def test_families_differ_in_bias_and_head_norm(family: str, bias: bool, norm: bool) -> None:
    config = from_hf(values(family))
    assert (config.family, config.attention_bias, config.qk_norm) == (family, bias, norm)


def test_what_may_be_left_out() -> None:
    config = from_hf(values(num_key_value_heads=None, eos_token_id=None, bos_token_id=None))
    assert config.num_kv_heads == config.num_heads == 4
    assert config.eos_tokens == () and config.bos_token is None


def test_an_own_head_dim_and_several_ends() -> None:
    config = from_hf(values("qwen3", head_dim=24, eos_token_id=[5, 6], tie_word_embeddings=True))
    assert config.head_dim == 24 and config.eos_tokens == (5, 6) and config.tie_embeddings


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 4.5,
    "original_max_position_embeddings": 256,
}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, {"rope_parameters": {"rope_theta": 5e5, **LLAMA3}}),
        (
            {"rope_theta": 2e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_theta": 2e4, "rope_type": "linear", "factor": 2.0}},
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 16}},
            {
                "rope_parameters": {
                    "rope_theta": 1e4,
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 128,
                    "beta_fast": 16,
                }
            },
        ),
    ],
    ids=["plain", "llama3", "linear", "yarn"],
)
def test_both_generations_of_config_say_the_same(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert from_hf(values(**old)) == from_hf(values(**new))
    theta = old.get("rope_theta", 1e4)
    assert from_hf(values(**old)).rope_theta == theta


def test_scaling_is_read_in_full() -> None:
    scaling = from_hf(values(rope_scaling=LLAMA3)).rope_scaling
    assert scaling is not None
    assert (scaling.kind, scaling.factor, scaling.original_max_positions) == ("llama3", 8.0, 256)
    assert (scaling.low_freq_factor, scaling.high_freq_factor) == (1.5, 4.5)
    default = from_hf(values(rope_scaling={"rope_type": "yarn", "factor": 2.0})).rope_scaling
    assert default is not None and default.original_max_positions == 1024


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "qwen2", "use_sliding_window": True, "sliding_window": 64}, "sliding-window"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0}}, "longrope"),
        ({"attention_bias": True}, "attention bias"),
        ({"family": "qwen3", "attention_bias": True}, "attention bias"),
        ({"mlp_bias": True}, "MLP bias"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
        ({"architectures": ["LlamaForCausaLM"]}, "LlamaForCausalLM"),
        ({"architectures": ["Qwen2MoeForCausalLM"]}, "Qwen3MoeForCausalLM"),
        ({"architectures": []}, "none"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnknownArchitecture, match=message):
        from_hf(values(**changes))


def test_a_sliding_window_that_is_not_in_use_is_fine() -> None:
    assert from_hf(values("qwen2", use_sliding_window=False, sliding_window=64)).family == "qwen2"


@pytest.mark.parametrize("key", ["hidden_size", "num_attention_heads", "vocab_size", "intermediate_size"])
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(BadWeights, match=key):
        from_hf(values(**{key: None}))


def test_a_scaling_without_its_factor_is_bad() -> None:
    with pytest.raises(BadWeights, match="factor"):
        from_hf(values(rope_scaling={"rope_type": "linear"}))


def test_a_factor_of_null_is_the_ratio_of_lengths_for_yarn_alone() -> None:
    changes = {"factor": None, "original_max_position_embeddings": 256}
    scaling = from_hf(values(rope_scaling={"rope_type": "yarn", **changes})).rope_scaling
    assert scaling is not None and scaling.factor == 4.0
    with pytest.raises(BadWeights):
        from_hf(values(rope_scaling={"rope_type": "linear", **changes}))


def test_a_quantisation_of_null_is_none() -> None:
    assert from_hf({**values(), "quantization_config": None}).family == "llama"


def gguf_metadata(**changes: Any) -> dict[str, Any]:
    base = {
        "general.architecture": "qwen2",
        "qwen2.embedding_length": 64,
        "qwen2.block_count": 3,
        "qwen2.attention.head_count": 4,
        "qwen2.attention.head_count_kv": 2,
        "qwen2.feed_forward_length": 96,
        "qwen2.attention.layer_norm_rms_epsilon": 1e-5,
        "qwen2.context_length": 1024,
        "tokenizer.ggml.tokens": ["a", "b", "c"],
        "tokenizer.ggml.eos_token_id": 2,
    }
    return {key: value for key, value in {**base, **changes}.items() if value is not None}


def test_gguf_metadata_gives_the_same_shapes() -> None:
    config = from_gguf(
        gguf_metadata(**{"qwen2.rope.freq_base": 1e6, "tokenizer.ggml.eot_token_id": 1}), has_output=False
    )
    assert (config.hidden_size, config.num_layers, config.num_heads, config.num_kv_heads) == (64, 3, 4, 2)
    assert (config.head_dim, config.vocab_size, config.rope_theta) == (16, 3, 1e6)
    assert config.tie_embeddings and config.attention_bias and config.eos_tokens == (2, 1)
    assert not from_gguf(gguf_metadata(), has_output=True).tie_embeddings


def test_gguf_scaling() -> None:
    names = {"qwen2.rope.scaling.type": "yarn", "qwen2.rope.scaling.factor": 4.0}
    names["qwen2.rope.scaling.original_context_length"] = 256
    scaling = from_gguf(gguf_metadata(**names), has_output=True).rope_scaling
    assert scaling is not None and (scaling.kind, scaling.factor, scaling.original_max_positions) == ("yarn", 4.0, 256)
    with pytest.raises(UnknownArchitecture, match="longrope"):
        from_gguf(gguf_metadata(**{"qwen2.rope.scaling.type": "longrope"}), has_output=True)


def test_gguf_yarn_without_an_original_length_can_be_used() -> None:
    names = {"qwen2.rope.scaling.type": "yarn", "qwen2.rope.scaling.factor": 4.0}
    assert torch.isfinite(rope_table(from_gguf(gguf_metadata(**names), has_output=True), 8)).all()


@pytest.mark.parametrize(
    "key",
    [
        "qwen2.embedding_length",
        "qwen2.context_length",
        "tokenizer.ggml.tokens",
    ],
)
def test_missing_gguf_metadata_is_named(key: str) -> None:
    with pytest.raises(BadWeights, match=key):
        from_gguf(gguf_metadata(**{key: None}), has_output=True)


def test_rope_table_holds_cosines_then_sines() -> None:
    table = rope_table(tiny_config(head_dim=8, rope_theta=100.0), 5)
    assert table.shape == (5, 8) and table.dtype == torch.float32
    angles = 3 / 100.0 ** (torch.arange(4) / 4)
    torch.testing.assert_close(table[3], torch.cat([angles.cos(), angles.sin()]))
    torch.testing.assert_close(table[0], torch.tensor([1.0] * 4 + [0.0] * 4))


def directory(path: Path, config: object, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    save_file(tensors or {"x": torch.zeros(2)}, path / "model.safetensors")
    return path


def test_a_directory_is_opened_and_its_ends_are_those_of_both_files(tmp_path: Path) -> None:
    directory(tmp_path, values())
    assert open_checkpoint(tmp_path).config.eos_tokens == (7,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [8, 9]}))
    assert open_checkpoint(tmp_path).config.eos_tokens == (8, 9, 7)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert open_checkpoint(tmp_path).config.eos_tokens == (7,)


def test_tensors_come_from_every_file_in_the_wanted_type(tmp_path: Path) -> None:
    directory(tmp_path, values(), {"a": torch.ones(2, dtype=torch.bfloat16)})
    save_file({"b": torch.full((3,), 2.0)}, tmp_path / "model-2.safetensors")
    found = dict(open_checkpoint(tmp_path).tensors(torch.float16))
    assert set(found) == {"a", "b"} and all(each.dtype == torch.float16 for each in found.values())
    assert found["b"].tolist() == [2.0] * 3


def test_identity_follows_the_weights(tmp_path: Path) -> None:
    one = open_checkpoint(directory(tmp_path / "one", values())).identity
    same = open_checkpoint(directory(tmp_path / "same", values())).identity
    other = open_checkpoint(directory(tmp_path / "other", values(), {"x": torch.ones(2)})).identity
    assert one == same != other


def test_no_model_there(tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match="nowhere"):
        open_checkpoint(tmp_path / "nowhere")


def test_directories_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(BadWeights, match="safetensors"):
        open_checkpoint(tmp_path)
    directory(tmp_path, values())
    (tmp_path / "config.json").unlink()
    with pytest.raises(BadWeights, match=r"config\.json"):
        open_checkpoint(tmp_path)
    directory(tmp_path, "{ not json")
    with pytest.raises(BadWeights, match="not JSON"):
        open_checkpoint(tmp_path)


def test_cut_short_safetensors_are_bad_weights(tmp_path: Path) -> None:
    file = directory(tmp_path, values(), {"x": torch.zeros(1000)}) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BadWeights, match=r"model\.safetensors"):
        list(open_checkpoint(tmp_path).tensors(torch.float32))


def test_a_directory_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(directory(tmp_path, values()))
    with pytest.raises(BadWeights, match=r"tokenizer\.json"):
        checkpoint.tokenizer()
