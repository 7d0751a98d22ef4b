"""Drafters on disk: what is written is read in every style, layers are counted right, and each fault is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from paceline.drafters.checkpoint import (
    STYLES,
    DraftCheckpoint,
    check_target,
    read_checkpoint,
    tensor_shapes,
    vocabulary_digest,
    write_checkpoint,
)
from paceline.drafters.checkpoint_styles import from_json
from paceline.drafters.config import DraftConfig
from paceline.errors import BadDrafter
from paceline.models.config import ModelConfig, RopeScaling
from tests.tiny import VOCABULARY, ByteTokenizer, tiny_config

DRAFTED = 100
LAYER = tiny_config("llama", num_layers=1, tie_embeddings=False, rope_theta=50000.0)
BLOCK_LAYER = tiny_config("qwen3", tie_embeddings=False)
EAGLE = DraftConfig(
    "eagle3", LAYER, (1, 2, 4), 32, DRAFTED, target_digest="of the target", vocabulary_digest="of its tokens"
)
DFLASH = DraftConfig("dflash", BLOCK_LAYER, (1, 3), 32, VOCABULARY, block_size=8, mask_token=256)
DSPARK = replace(DFLASH, draft_vocab_size=DRAFTED, sample_from_anchor=True, markov_rank=4, confidence_head=True)
LONG = RopeScaling("yarn", 4.0, 1024, beta_fast=16.0)
CONFIGS = {
    "eagle3": EAGLE,
    "eagle3 whole vocabulary": replace(EAGLE, draft_vocab_size=VOCABULARY),
    "eagle3 norm before fc": replace(EAGLE, norm_before_fc=True),
    "eagle3 norms": replace(EAGLE, fc_norm=True, norm_output=True, features=(2, 4)),
    "eagle3 llama3 rope": replace(EAGLE, layer=replace(LAYER, rope_scaling=RopeScaling("llama3", 8.0, 512, 1.0, 4.0))),
    "eagle3 yarn rope": replace(EAGLE, layer=replace(LAYER, rope_scaling=LONG)),
    "eagle3 narrow": replace(EAGLE, target_hidden_size=48),
    "dflash": DFLASH,
    "dspark": DSPARK,
}


def tensors_of(config: DraftConfig, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(len(config.features))
    needed, optional = tensor_shapes(config)
    if config.target_hidden_size != config.layer.hidden_size:
        needed = {**needed, "embed_tokens.weight": optional["embed_tokens.weight"]}
    return {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in sorted(needed.items())}


def tokens_of(config: DraftConfig) -> Tensor | None:
    if config.draft_vocab_size == VOCABULARY:
        return None
    return (
        torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(1))[: config.draft_vocab_size].sort().values
    )


HEAD = torch.randn(VOCABULARY, 32, generator=torch.Generator().manual_seed(2))


def written(path: Path, config: DraftConfig, style: str, **changes: Any) -> Path:
    write_checkpoint(path, config, tensors_of(config), tokens_of(config), style=style, **{"head": HEAD, **changes})
    return path


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_style_is_read_bit_by_bit(tmp_path: Path, name: str, style: str) -> None:
    config, card = CONFIGS[name], {"target": "smollm2-135m", "tokens": 5}
    found = read_checkpoint(written(tmp_path / "drafter", config, style, card=card))
    assert found.config == config
    assert found.card == card
    expected, tokens = tensors_of(config), tokens_of(config)
    if style != "paceline" and (config.kind == "eagle3" or tokens is not None):
        expected["lm_head.weight"] = (HEAD if tokens is None else HEAD[tokens]).bfloat16()
    assert found.tensors.keys() == expected.keys()
    assert all(torch.equal(found.tensors[each], expected[each]) for each in expected)
    assert (found.draft_tokens is None) == (tokens is None)
    assert tokens is None or torch.equal(found.draft_tokens, tokens)


def test_own_head_is_kept(tmp_path: Path) -> None:
    own = {**tensors_of(EAGLE), "lm_head.weight": torch.randn(DRAFTED, 32)}
    for style in STYLES:
        write_checkpoint(tmp_path / style, EAGLE, own, tokens_of(EAGLE), style=style, head=HEAD)
        assert torch.equal(read_checkpoint(tmp_path / style).tensors["lm_head.weight"], own["lm_head.weight"])


@pytest.mark.parametrize("config", [EAGLE, DSPARK], ids=["eagle3", "dspark"])
def test_float8_keeps_rows_within_its_rounding(tmp_path: Path, config: DraftConfig) -> None:
    tensors = {name: each * 10.0 ** (index % 7 - 3) for index, (name, each) in enumerate(tensors_of(config).items())}
    tensors["fc.weight"][3] = 0
    write_checkpoint(tmp_path / "eight", config, tensors, tokens_of(config), float8=True)
    write_checkpoint(tmp_path / "sixteen", config, tensors, tokens_of(config))
    stored = load_file(tmp_path / "eight")
    assert stored["fc.weight"].dtype == torch.float8_e4m3fn and stored["fc.weight_scale"].dtype == torch.float32
    assert (tmp_path / "eight").stat().st_size < 0.75 * (tmp_path / "sixteen").stat().st_size
    found = read_checkpoint(tmp_path / "eight").tensors
    for name, each in tensors.items():
        if each.dim() < 2:
            assert torch.equal(found[name], each)
            continue
        tokens = tokens_of(config)
        if name == "markov_head.markov_w1.weight" and tokens is not None:  # stored for draft tokens alone
            assert len(stored[name]) == DRAFTED
            each = torch.zeros_like(each).index_copy(0, tokens, each[tokens])
        largest = each.float().abs().amax(dim=1, keepdim=True)
        # three bits of mantissa, and below 2 ** -6 of 448 steps of 2 ** -9; then eight bits of bfloat16
        allowed = (each.float().abs() * (2**-4 + 2**-8)).maximum(largest / 448 * 2**-10) * 1.01
        assert found[name].dtype == torch.bfloat16
        assert ((found[name].float() - each.float()).abs() <= allowed).all(), name


def flat_eagle3(**changes: Any) -> dict[str, Any]:
    """A config.json as SpecForge writes it for a target of 36 layers."""
    values = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_hidden_layers": 1,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "rope_scaling": None,
        "vocab_size": VOCABULARY,
        "draft_vocab_size": DRAFTED,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 17, 32], "use_aux_hidden_state": True},
    }
    return {key: value for key, value in {**values, **changes}.items() if value is not Ellipsis}


def speculators_eagle3(**changes: Any) -> dict[str, Any]:
    """A config.json as speculators writes it."""
    inner = flat_eagle3()
    layer = {
        key: inner[key]
        for key in inner
        if key not in ("eagle_config", "draft_vocab_size", "architectures", "rope_theta")
    }
    layer["rope_parameters"] = {"rope_type": "default", "rope_theta": 1000000.0}
    values = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "draft_vocab_size": DRAFTED,
        "norm_before_residual": False,
        "eagle_aux_hidden_state_layer_ids": [2, 18, 33],
        "target_hidden_size": None,
        "transformer_layer_config": layer,
        "speculators_config": {"algorithm": "eagle3"},
    }
    return {key: value for key, value in {**values, **changes}.items() if value is not Ellipsis}


def dflash(**changes: Any) -> dict[str, Any]:
    """A config.json as SpecForge writes it for a block drafter."""
    values = {
        **flat_eagle3(architectures=["DFlashDraftModel"], model_type="qwen3", num_hidden_layers=2),
        "block_size": 16,
        "num_target_layers": 36,
        "draft_vocab_size": None,
        "layer_types": ["full_attention"] * 2,
        "dflash_config": {"mask_token_id": 250, "target_layer_ids": [1, 9, 17, 25, 33]},
    }
    del values["eagle_config"]
    return {**values, **changes}


def test_both_styles_name_the_same_layers() -> None:
    ours = (2, 18, 33)
    flat, other = from_json(flat_eagle3()), from_json(speculators_eagle3())
    assert flat.features == other.features == ours
    assert flat == other
    assert flat.layer.rope_theta == 1000000.0 and flat.layer.family == "llama"
    assert from_json(flat_eagle3(eagle_config=...), num_target_layers=36).features == ours
    assert from_json(speculators_eagle3(eagle_aux_hidden_state_layer_ids=None), num_target_layers=36).features == ours
    at_top = flat_eagle3(eagle_config=..., eagle_aux_hidden_state_layer_ids=[2, 18, 33])
    assert from_json(at_top).features == ours
    assert from_json(dflash()).features == (2, 10, 18, 26, 34)


def test_written_layers_are_those_of_the_style(tmp_path: Path) -> None:
    def values(config: DraftConfig, style: str) -> dict[str, Any]:
        return json.loads((written(tmp_path / style, config, style) / "config.json").read_text())

    config = replace(EAGLE, features=(2, 18, 33))
    assert values(config, "vllm")["eagle_aux_hidden_state_layer_ids"] == [2, 18, 33]
    assert values(config, "sglang")["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 17, 32]
    assert values(DFLASH, "vllm")["aux_hidden_state_layer_ids"] == [1, 3]
    assert values(DFLASH, "sglang")["dflash_config"]["target_layer_ids"] == [0, 2]


def test_written_folders_hold_what_the_servers_demand(tmp_path: Path) -> None:
    card = {"target": "HuggingFaceTB/SmolLM2-135M-Instruct", "speculative_tokens": 4}
    values = json.loads((written(tmp_path / "vllm", EAGLE, "vllm", card=card) / "config.json").read_text())
    assert values["speculators_config"]["verifier"]["name_or_path"] == card["target"]
    assert values["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 4
    assert values["norm_before_residual"] is False
    stored = load_file(written(tmp_path / "sglang", EAGLE, "sglang") / "model.safetensors")
    assert "midlayer.self_attn.q_proj.weight" in stored and "layers.0.self_attn.q_proj.weight" not in stored
    tokens = tokens_of(EAGLE)
    assert tokens is not None
    assert torch.equal(stored["d2t"] + torch.arange(DRAFTED), tokens)
    assert stored["t2d"].dtype == torch.bool and torch.equal(stored["t2d"].nonzero().flatten(), tokens)
    block = json.loads((written(tmp_path / "dspark", DSPARK, "vllm") / "config.json").read_text())
    assert block["sample_from_anchor"] is True
    assert block["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 8
    plain = load_file(written(tmp_path / "dflash", DFLASH, "sglang") / "model.safetensors")
    assert not {"lm_head.weight", "d2t", "t2d", "embed_tokens.weight"} & plain.keys()


def test_dspark_is_read_in_both_styles() -> None:
    heads = {"markov_rank": 8, "markov_head_type": "vanilla", "enable_confidence_head": True}
    inner = {"mask_token_id": 250, "target_layer_ids": [1, 9], "projector_type": "dspark", **heads}
    flat = from_json(dflash(architectures=["DSparkDraftModel"], dflash_config=inner))
    layer = {key: value for key, value in dflash().items() if key not in ("dflash_config", "block_size")}
    other = from_json(
        {
            "speculators_model_type": "dspark",
            "transformer_layer_config": layer,
            "aux_hidden_state_layer_ids": [2, 10],
            "block_size": 16,
            "mask_token_id": 250,
            **heads,
        }
    )
    assert flat == other
    assert (flat.markov_rank, flat.confidence_head, flat.sample_from_anchor, flat.num_drafted) == (8, True, False, 15)


def test_norm_before_residual_left_out_is_said(caplog: pytest.LogCaptureFixture) -> None:
    assert from_json(speculators_eagle3(norm_before_residual=...)).norm_before_residual is True
    assert "norm_before_residual: taken as true, as vLLM does" in caplog.text


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "no theta": (flat_eagle3(rope_theta=...), "has no rope_theta"),
    "unknown rope": (
        flat_eagle3(rope_scaling={"rope_type": "longrope", "factor": 4.0}),
        "RoPE scaling 'longrope' is not known",
    ),
    "tied": (flat_eagle3(tie_word_embeddings=True), "tie_word_embeddings is true, but the head has 100 rows"),
    "two layers": (flat_eagle3(num_hidden_layers=2), "an EAGLE-3 drafter of 2 layers"),
    "architecture": (
        flat_eagle3(architectures=["LlamaForCausalLMEagle"]),
        "the nearest that is: 'LlamaForCausalLMEagle3'",
    ),
    "type": (speculators_eagle3(speculators_model_type="eagle"), "speculators_model_type 'eagle' is not known"),
    "no layers": (flat_eagle3(eagle_config=...), "the default depends on the target"),
    "no aux": (flat_eagle3(eagle_config={"use_aux_hidden_state": False}), "use_aux_hidden_state is false"),
    "no size": (flat_eagle3(hidden_size=...), "lacks 'hidden_size'"),
    "no layer config": (speculators_eagle3(transformer_layer_config=...), "lacks 'transformer_layer_config'"),
    "gemma": (flat_eagle3(model_type="gemma"), "architecture 'gemma' is not known"),
    "bias": (flat_eagle3(attention_bias=True), "uses an attention bias"),
    "large": (flat_eagle3(draft_vocab_size=1000), "a draft vocabulary of 1000 of 258 tokens"),
    "both norms": (speculators_eagle3(fc_norm=True, norm_before_fc=True), "exclude each other"),
    "no mask": (dflash(dflash_config={"target_layer_ids": [1]}), "mask_token_id None"),
    "no block": (dflash(block_size=None), "block_size None"),
    "no block layers": (dflash(dflash_config={"mask_token_id": 1}), "names no target_layer_ids"),
    "projector": (
        dflash(dflash_config={**dflash()["dflash_config"], "projector_type": "domino"}),
        "projector_type 'domino'",
    ),
    "window": (dflash(layer_types=["sliding_attention"] * 2), "uses sliding-window attention"),
    "values": (flat_eagle3(num_attention_heads="four"), "cannot be used"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_bad_configs_are_named(name: str) -> None:
    values, message = BAD_CONFIGS[name]
    with pytest.raises(BadDrafter) as error:
        from_json(values)
    assert message in str(error.value)


Change = Callable[[dict[str, Tensor]], object]
BAD_TENSORS: dict[str, tuple[Change, str]] = {
    "missing": (lambda all: all.pop("layers.0.mlp.up_proj.weight"), "lacks layers.0.mlp.up_proj.weight"),
    "extra": (lambda all: all.update({"verifier_norm.weight": torch.ones(32)}), "has no use for: verifier_norm.weight"),
    "many extra": (
        lambda all: all.update({f"x{n}": torch.ones(1) for n in range(9)}),
        "x0, x1, x2, x3, x4, x5 and 3 more",
    ),
    "shape": (
        lambda all: all.update({"fc.weight": torch.ones(32, 64)}),
        "fc.weight is [32, 64], and by its config should be [32, 96]",
    ),
    "dtype": (lambda all: all.update({"norm.weight": torch.ones(32).int()}), "norm.weight is of int32"),
    "no d2t": (lambda all: all.pop("d2t"), "lacks d2t"),
    "short d2t": (lambda all: all.update({"d2t": all["d2t"][:9].clone()}), "d2t is [9]"),
    "float d2t": (lambda all: all.update({"d2t": all["d2t"].float()}), "does not hold whole numbers"),
    "outside": (lambda all: all["d2t"][-1].fill_(VOCABULARY), f"outside the vocabulary of {VOCABULARY}"),
    "negative": (lambda all: all["d2t"][0].fill_(-1), "leads to token -1"),
    "twice": (lambda all: all["d2t"][5].copy_(all["d2t"][4] - 1), "does not ascend: its tokens 4 and 5"),
    "t2d": (lambda all: all["t2d"].logical_not_(), "t2d does not list the tokens"),
    "short t2d": (lambda all: all.update({"t2d": all["t2d"][:9].clone()}), "t2d does not list the tokens"),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_bad_tensors_are_named(tmp_path: Path, name: str) -> None:
    change, message = BAD_TENSORS[name]
    file = written(tmp_path / "drafter", EAGLE, "vllm") / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(BadDrafter) as error:
        read_checkpoint(tmp_path / "drafter")
    assert message in str(error.value)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    def fault(path: Path) -> str:
        with pytest.raises(BadDrafter) as error:
            read_checkpoint(path)
        return str(error.value)

    assert "there is no drafter" in fault(tmp_path / "none")
    file = written(tmp_path / "one.safetensors", EAGLE, "paceline")
    (tmp_path / "short.safetensors").write_bytes(file.read_bytes()[:-100])
    assert "short.safetensors is cut short or damaged" in fault(tmp_path / "short.safetensors")
    folder = written(tmp_path / "folder", EAGLE, "vllm")
    assert "for a drafter in a folder, give the folder" in fault(folder / "model.safetensors")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config[:50])
    assert "config.json does not hold JSON" in fault(folder)
    (folder / "config.json").write_text(config)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pytorch_model.bin is not read" in fault(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"norm.weight": "a.safetensors"}}))
    assert "lacks a.safetensors" in fault(folder)
    (folder / "config.json").unlink()
    assert "holds no config.json" in fault(folder)


def test_shards_are_read_by_their_index(tmp_path: Path) -> None:
    folder = written(tmp_path / "folder", EAGLE, "sglang")
    whole = read_checkpoint(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = list(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, members in parts.items():
        save_file({name: tensors[name] for name in members}, folder / file)
    listed = {name: file for file, members in parts.items() for name in members}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    found = read_checkpoint(folder)
    assert all(torch.equal(found.tensors[name], whole.tensors[name]) for name in whole.tensors)


def test_a_float8_matrix_without_scales_is_named(tmp_path: Path) -> None:
    file = written(tmp_path / "one.safetensors", EAGLE, "paceline", float8=True)
    assert read_checkpoint(file).config == EAGLE
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    del tensors["fc.weight_scale"]
    save_file(tensors, file, metadata=metadata)
    with pytest.raises(BadDrafter, match=r"lacks fc\.weight_scale"):
        read_checkpoint(file)


UNWRITABLE: dict[str, tuple[DraftConfig, str, dict[str, Any], str]] = {
    "style": (EAGLE, "gguf", {}, "the style 'gguf' is not known"),
    "residual": (replace(EAGLE, norm_before_residual=True), "sglang", {}, "norm_before_residual is true"),
    "layer 0": (replace(EAGLE, features=(0, 1, 2)), "sglang", {}, "reads the embeddings"),
    "no head": (EAGLE, "vllm", {"head": None}, "give the target's head"),
    "head": (EAGLE, "vllm", {"head": HEAD[:100]}, "the target's head is [100, 32]"),
    "divisors": (
        replace(EAGLE, layer=replace(LAYER, rope_scaling=RopeScaling("divided", divisors=(1.0,) * 4))),
        "vllm",
        {},
        "RoPE divisors of a GGUF file",
    ),
    "anchor": (replace(DFLASH, sample_from_anchor=True), "vllm", {}, "sample_from_anchor is true"),
    "float8": (EAGLE, "vllm", {"float8": True}, "float8 is of Paceline's own files"),
}


@pytest.mark.parametrize("name", UNWRITABLE)
def test_what_a_style_cannot_say_is_named(tmp_path: Path, name: str) -> None:
    config, style, changes, message = UNWRITABLE[name]
    with pytest.raises(BadDrafter) as error:
        written(tmp_path / "drafter", config, style, **changes)
    assert message in str(error.value)


def test_divisors_are_kept_in_our_own_file(tmp_path: Path) -> None:
    config = replace(EAGLE, layer=replace(LAYER, rope_scaling=RopeScaling("divided", divisors=(1.0, 1.0, 2.0, 4.0))))
    assert read_checkpoint(written(tmp_path / "drafter", config, "paceline")).config == config


TARGET = tiny_config("llama", num_layers=4)
MISFITS: dict[str, tuple[DraftConfig, ModelConfig, str]] = {
    "layers": (EAGLE, replace(TARGET, num_layers=3), "reads the layers [4] of a target that has 3"),
    "width": (EAGLE, replace(TARGET, hidden_size=64), "reads states of 32 values, and the target's have 64"),
    "borrowed": (replace(EAGLE, target_hidden_size=48), replace(TARGET, hidden_size=48), "hidden size is 32, not 48"),
    "vocabulary": (EAGLE, replace(TARGET, vocab_size=300), "has 258 tokens, and the target's 300"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_drafter_of_another_target_is_named(name: str) -> None:
    config, target, message = MISFITS[name]
    with pytest.raises(BadDrafter) as error:
        check_target(DraftCheckpoint(config, {}), target, "of the target", force=True)
    assert message in str(error.value)


def test_other_weights_need_force_and_another_tokenizer_is_refused() -> None:
    checkpoint = DraftCheckpoint(EAGLE, {})
    check_target(checkpoint, TARGET, "of the target", vocabulary="of its tokens")
    check_target(checkpoint, TARGET)
    with pytest.raises(BadDrafter, match="--force"):
        check_target(checkpoint, TARGET, "of others")
    check_target(checkpoint, TARGET, "of others", force=True)
    with pytest.raises(BadDrafter, match="another tokenizer"):
        check_target(checkpoint, TARGET, "of the target", force=True, vocabulary="of others")


class Renamed(ByteTokenizer):
    def token_bytes(self, token: int) -> bytes:
        return b"[PAD256]" if token == 256 else super().token_bytes(token)


class Other(ByteTokenizer):
    def token_bytes(self, token: int) -> bytes:
        return super().token_bytes(token ^ 1)


def test_the_digest_of_a_vocabulary_ignores_unused_tokens() -> None:
    digest = vocabulary_digest(ByteTokenizer())  # type: ignore[arg-type]
    assert digest == vocabulary_digest(Renamed())  # type: ignore[arg-type]
    assert digest != vocabulary_digest(Other())  # type: ignore[arg-type]
