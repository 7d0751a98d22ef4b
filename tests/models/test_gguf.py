"""GGUF files: every supported quantisation, the names and row order of the tensors, and what is said of a bad file."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from paceline.errors import BadWeights, ModelError, UnknownArchitecture
from paceline.models import stored as module
from paceline.models.checkpoint import open_checkpoint
from paceline.models.config import RopeScaling
from paceline.models.decoder import Decoder
from paceline.models.gguf import GGUFFile
from paceline.models.rope import rope_table
from paceline.ops.quantised import FORMATS
from tests.tiny import random_tensors, tiny_config

Array = numpy.ndarray[Any, Any]
KINDS = [Kind[name] for name in FORMATS]
WORDS = ["<|end|>", "a", "b", "ab"]
TO_GGUF = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def write(
    path: Path,
    tensors: dict[str, tuple[Array, Kind]],
    architecture: str = "llama",
    pre: str = "smollm",
    vocab: int = 4,
    sampling: dict[str, int | float] | None = None,
) -> Path:
    """A small GGUF file: raw bytes or float values under GGUF's names, and a tokenizer of a few words."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(256)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    words = WORDS + [f"w{index}" for index in range(vocab - len(WORDS))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(words)
    writer.add_token_types([3] + [1] * (len(words) - 1))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    for name, value in (sampling or {}).items():
        add = writer.add_int32 if isinstance(value, int) else writer.add_float32
        add(f"general.sampling.{name}", value)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def floats(*shape: int, seed: int = 0) -> Array:
    return numpy.random.default_rng(seed).standard_normal(shape).astype(numpy.float32)


def stored(kind: Kind, rows: int = 6, columns: int = 512) -> Array:
    """Data of a kind, quantised by the library, or random blocks with sane scales where it can only decode."""
    try:
        data: Array = gguf.quantize(floats(rows, columns), kind)
        return data
    except NotImplementedError:
        per_block, size = gguf.GGML_QUANT_SIZES[kind]
        draw = numpy.random.default_rng(1)
        blocks = draw.integers(0, 256, (rows, columns // per_block, size), dtype=numpy.uint8)
        scale = draw.uniform(-1, 1, (rows, columns // per_block, 2)).astype(numpy.float16).view(numpy.uint8)
        if kind is Kind.Q4_K:  # two half-precision scales come first
            blocks[..., :4] = scale
        else:  # Q6_K: one comes last
            blocks[..., -2:] = scale[..., :2]
        return blocks.reshape(rows, -1)


def q_and_k(name: str) -> bool:
    return ".attn_q." in name or ".attn_k." in name


def permuted(weight: Array, heads: int) -> Array:
    """A llama's rows as GGUF stores them: row i of a head's first half, then row i of its second half, and so on."""
    dim = weight.shape[0] // heads
    order = [
        head * dim + half * (dim // 2) + row for head in range(heads) for row in range(dim // 2) for half in (0, 1)
    ]
    return weight[order]


def whole_model(
    family: str, kind: Kind = Kind.F32, tied: bool = True
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A tiny model's tensors under both sets of names, the second as GGUF stores them."""
    config = tiny_config(family, tie_embeddings=tied, vocab_size=16)
    ours = dict(random_tensors(config))
    theirs: dict[str, Any] = {}
    for name, tensor in ours.items():
        data, heads = tensor.numpy(), {"q_proj": 4, "k_proj": 2}
        if name in WHOLE:
            new = WHOLE[name]
        else:
            _, _, number, rest = name.split(".", 3)
            part, kind_of = rest.rsplit(".", 1)
            new = f"blk.{number}.{TO_GGUF[part]}.{kind_of}"
            if family == "llama" and part.split(".")[-1] in heads:
                data = permuted(data, heads[part.split(".")[-1]])
        chosen = kind if data.ndim == 2 else Kind.F32
        theirs[new] = (gguf.quantize(data, chosen), chosen)
    return ours, theirs


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("slice_size", [4_000_000, 1024])
def test_every_kind_is_what_the_library_makes_of_it(
    kind: Kind, slice_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SLICE", slice_size)
    data = stored(kind)
    file = GGUFFile(write(tmp_path / "m.gguf", {"blk.0.ffn_up.weight": (data, kind)}))
    expected = torch.from_numpy(gguf.dequantize(data, kind).astype(numpy.float32)).view(6, 512)
    assert torch.isfinite(expected).all() and expected.abs().max() > 0.5
    [(name, found)] = file.tensors(torch.float32)
    assert name == "model.layers.0.mlp.up_proj.weight" and found.dtype == torch.float32
    assert torch.equal(found, expected)
    for dtype in (torch.bfloat16, torch.float16):
        [(_, found)] = file.tensors(dtype)
        assert found.dtype == dtype and torch.equal(found, expected.to(dtype))


@pytest.mark.parametrize(
    "kind",
    [
        Kind.F32,
        Kind.F16,
        Kind.BF16,
    ],
    ids=lambda kind: getattr(kind, "name", None),
)
def test_vectors_of_every_float_kind(kind: Kind, tmp_path: Path) -> None:
    values = floats(32)
    data = gguf.quantize(values, kind)
    file = GGUFFile(write(tmp_path / "m.gguf", {"output_norm.weight": (data, kind)}))
    [(name, found)] = file.tensors(torch.float32)
    assert name == "model.norm.weight"
    assert torch.equal(found, torch.from_numpy(gguf.dequantize(data, kind).astype(numpy.float32)))


def test_a_llamas_query_and_key_rows_are_put_back(tmp_path: Path) -> None:
    query, key, value = floats(32, 32, seed=1), floats(16, 32, seed=2), floats(16, 32, seed=3)
    tensors = {
        "blk.1.attn_q.weight": (permuted(query, 4), Kind.F32),
        "blk.1.attn_k.weight": (permuted(key, 2), Kind.F32),
        "blk.1.attn_v.weight": (value, Kind.F32),
    }
    found = dict(GGUFFile(write(tmp_path / "m.gguf", tensors)).tensors(torch.float32))
    for part, expected in {"q": query, "k": key, "v": value}.items():
        assert torch.equal(found[f"model.layers.1.self_attn.{part}_proj.weight"], torch.from_numpy(expected)), part


def test_quantised_query_rows_are_put_back(tmp_path: Path) -> None:
    data = gguf.quantize(permuted(floats(32, 64), 4), Kind.Q8_0)
    file = GGUFFile(write(tmp_path / "m.gguf", {"blk.0.attn_q.weight": (data, Kind.Q8_0)}))
    [(_, found)] = file.tensors(torch.float32)
    assert torch.equal(found, torch.from_numpy(gguf.dequantize(gguf.quantize(floats(32, 64), Kind.Q8_0), Kind.Q8_0)))


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_qwens_rows_stay_where_they_are(family: str, tmp_path: Path) -> None:
    query = floats(32, 32)
    file = GGUFFile(write(tmp_path / "m.gguf", {"blk.0.attn_q.weight": (query, Kind.F32)}, family))
    [(_, found)] = file.tensors(torch.float32)
    assert torch.equal(found, torch.from_numpy(query))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_whole_model_comes_back(family: str, tied: bool, tmp_path: Path) -> None:
    ours, theirs = whole_model(family, tied=tied)
    checkpoint = open_checkpoint(write(tmp_path / "m.gguf", theirs, family, vocab=16))
    found = list(checkpoint.tensors(torch.float32))
    assert [name for name, _ in found] == list(ours)
    assert all(torch.equal(tensor, ours[name]) for name, tensor in found)
    config = checkpoint.config
    assert config == tiny_config(
        family,
        tie_embeddings=tied,
        vocab_size=16,
        max_positions=256,
        eos_tokens=(0,),
        bos_token=0,
        rms_norm_eps=config.rms_norm_eps,
    )
    assert config.rms_norm_eps == pytest.approx(1e-6)
    model = Decoder(config, iter(found), torch.device("cpu"))
    assert len(model.layers) == 2 and model.head.rows == 16


def test_a_file_opened_once_can_be_read_twice(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path / "m.gguf", whole_model("llama", Kind.Q8_0)[1], vocab=16))
    first, second = (dict(checkpoint.tensors(torch.float32)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first) and first.keys() == second.keys()


def test_the_result_does_not_depend_on_the_file_staying_there(tmp_path: Path) -> None:
    ours, theirs = whole_model("qwen2")
    path = write(tmp_path / "m.gguf", theirs, "qwen2", vocab=16)
    found = dict(open_checkpoint(path).tensors(torch.float32))
    path.unlink()
    for tensor in found.values():
        tensor += 0  # a view of the mapped file could not be written to
    assert all(torch.equal(found[name], ours[name]) for name in ours)


def test_wrong_magic(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    for content in (b"", b"GG", b"GGML" + bytes(100), b"PK\x03\x04" + bytes(100)):
        path.write_bytes(content)
        with pytest.raises(BadWeights, match="not a GGUF file"):
            open_checkpoint(path)


def test_a_file_cut_short_anywhere_is_bad_weights(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", whole_model("llama")[1], vocab=16)
    whole = path.read_bytes()
    for size in [4, 8, 20, 24, 100, 300, 700, len(whole) // 4, len(whole) // 2, len(whole) - 64, len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(BadWeights, match=r"m\.gguf"):
            open_checkpoint(path)


def test_a_file_cut_within_its_last_tensor_says_it_is_short(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", {"token_embd.weight": (floats(4, 32), Kind.F32)})
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(BadWeights, match="cut short"):
        open_checkpoint(path)


def test_damage_never_shows_as_another_error(tmp_path: Path) -> None:
    """Random bytes changed in the head: the file opens, or a ModelError says why it does not."""
    path = write(tmp_path / "m.gguf", whole_model("llama")[1], vocab=16)
    whole = path.read_bytes()
    draw = random.Random(5)
    escaped = set()
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(draw.randrange(1, 4)):
            damaged[draw.randrange(4, 1200)] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            open_checkpoint(path)
        except ModelError:
            pass
        except Exception as error:
            escaped.add(f"{type(error).__name__}: {error}")
    assert not escaped


def test_a_quantisation_that_is_not_known_names_the_tensor_and_what_is(tmp_path: Path) -> None:
    data = gguf.quantize(floats(4, 64), Kind.Q5_0)
    path = write(tmp_path / "m.gguf", {"blk.0.ffn_down.weight": (data, Kind.Q5_0)})
    with pytest.raises(BadWeights, match=r"blk\.0\.ffn_down\.weight.*Q5_0.*Q4_K"):
        open_checkpoint(path)


@pytest.mark.parametrize("name", ["blk.1.attn_k.weight", "output_norm.weight", "token_embd.weight"])
def test_a_missing_tensor_is_named(name: str, tmp_path: Path) -> None:
    ours, theirs = whole_model("llama")
    index = list(theirs).index(name)
    del theirs[name]
    checkpoint = open_checkpoint(write(tmp_path / "m.gguf", theirs, vocab=16))
    with pytest.raises(BadWeights, match=f"lacks the tensors {list(ours)[index]}$"):
        Decoder(checkpoint.config, checkpoint.tensors(torch.float32), torch.device("cpu"))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_all_missing_tensors_are_named(family: str, tmp_path: Path) -> None:
    ours, theirs = whole_model(family, tied=False)
    some = {name: theirs[name] for name in list(theirs)[:-12]}
    checkpoint = open_checkpoint(write(tmp_path / "m.gguf", {**some, "output.weight": theirs["output.weight"]}, family))
    with pytest.raises(BadWeights) as caught:
        Decoder(checkpoint.config, checkpoint.tensors(torch.float32), torch.device("cpu"))
    missing = set(ours) - {name for name, _ in checkpoint.tensors(torch.float32)}
    assert set(str(caught.value).removeprefix("the checkpoint lacks the tensors ").split(", ")) == missing
    nothing = iter(())
    with pytest.raises(BadWeights, match=rf"and {len(ours) - 20} more$"):
        Decoder(tiny_config(family, tie_embeddings=False), nothing, torch.device("cpu"))


def split(folder: Path, num_parts: int = 3, architecture: str = "qwen2") -> list[Path]:
    """A tiny model in parts, as llama.cpp's own tool writes them: the model's metadata in the first one alone."""
    names = list(whole_model(architecture)[1])
    tensors = whole_model(architecture)[1]
    path = write(folder / "whole.gguf", {}, architecture, vocab=16)
    fields = gguf.GGUFReader(path).fields
    size = -(-len(names) // num_parts)
    parts = []
    for index in range(num_parts):
        parts.append(folder / f"tiny-{index + 1:05}-of-{num_parts:05}.gguf")
        writer = gguf.GGUFWriter(parts[-1], architecture if index == 0 else "")
        for name, field in fields.items() if index == 0 else ():
            if not name.startswith("GGUF.") and name != "general.architecture":
                kinds = field.types
                writer.add_key_value(name, field.contents(), kinds[0], kinds[1] if len(kinds) > 1 else None)
        writer.add_uint16("split.no", index)
        writer.add_uint16("split.count", num_parts)
        writer.add_int32("split.tensors.count", len(names))
        for name in names[index * size : (index + 1) * size]:
            data, kind = tensors[name]
            writer.add_tensor(name, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    path.unlink()
    return parts


@pytest.mark.parametrize("opened", [0, 1, 2])
def test_a_split_file_is_opened_by_any_of_its_parts(opened: int, tmp_path: Path) -> None:
    parts = split(tmp_path)
    checkpoint = open_checkpoint(parts[opened])
    found = dict(checkpoint.tensors(torch.float32))
    ours, _ = whole_model("qwen2")
    assert found.keys() == ours.keys() and all(torch.equal(found[name], ours[name]) for name in ours)
    assert checkpoint.tokenizer().encode("abba") == [3, 2, 1]
    Decoder(checkpoint.config, iter(found.items()), torch.device("cpu"))
    identity = checkpoint.identity
    data = bytearray(parts[2].read_bytes())
    data[-1] ^= 1
    parts[2].write_bytes(data)
    assert open_checkpoint(parts[opened]).identity != identity


def test_a_split_file_names_the_parts_that_are_missing(tmp_path: Path) -> None:
    parts = split(tmp_path, 4)
    parts[0].unlink()
    parts[2].unlink()
    with pytest.raises(BadWeights, match=r"part 2 of 4 .*lacks tiny-00001-of-00004\.gguf, tiny-00003-of-00004\.gguf$"):
        open_checkpoint(parts[1])


def test_parts_that_do_not_belong_together(tmp_path: Path) -> None:
    parts = split(tmp_path)
    alone = tmp_path / "renamed.gguf"
    parts[1].rename(alone)
    with pytest.raises(BadWeights, match=r"part 2 of 3 .*-00002-of-00003\.gguf"):
        open_checkpoint(alone)
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(BadWeights, match="is not part 2 of 3, as its name says"):
        open_checkpoint(parts[0])
    write(parts[1], {"output_norm.weight": (floats(32), Kind.F32)})
    with pytest.raises(BadWeights, match="is not part 2 of 3"):
        open_checkpoint(parts[0])


@pytest.mark.parametrize("name", ["blk.0.ffn_gate_exps.weight", "rope_freqs.weight", "blk.0.attn_q.scale.weight"])
def test_a_tensor_without_a_place_is_named(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", {name: (floats(4, 32), Kind.F32)})
    with pytest.raises(BadWeights, match=name.replace(".", r"\.")):
        open_checkpoint(path)


def test_rope_freqs_stretch_as_the_config_of_llama_3_does(tmp_path: Path) -> None:
    scaling = RopeScaling("llama3", 8.0, original_max_positions=1024, low_freq_factor=1.0, high_freq_factor=4.0)
    plain, stretched = (rope_table(tiny_config(rope_scaling=each), 2)[1, 4:].asin() for each in (None, scaling))
    divisors = (plain / stretched).numpy()
    assert divisors.max() > 7 and divisors.min() < 1.01
    tensors = {"rope_freqs.weight": (divisors, Kind.F32), "output_norm.weight": (floats(32), Kind.F32)}
    file = GGUFFile(write(tmp_path / "m.gguf", tensors))
    assert [name for name, _ in file.tensors(torch.float32)] == ["model.norm.weight"]
    expected = rope_table(tiny_config(rope_scaling=scaling), 50)
    torch.testing.assert_close(rope_table(file.config, 50), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("architecture", "near"), [("llama4", "llama"), ("qwen2moe", "qwen3moe"), ("qwen3next", "qwen3")]
)
def test_an_unknown_architecture_names_the_nearest(architecture: str, near: str, tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", {}, architecture)
    with pytest.raises(UnknownArchitecture, match=f"'{architecture}'.*'{near}'"):
        open_checkpoint(path)


def test_an_unknown_pre_tokenizer_names_the_known(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path / "m.gguf", {}, pre="gpt-4o"))
    with pytest.raises(BadWeights, match=r"gpt-4o.*llama-bpe, qwen2, smollm"):
        checkpoint.tokenizer()


def test_the_files_tokenizer(tmp_path: Path) -> None:
    tokenizer = open_checkpoint(write(tmp_path / "m.gguf", {})).tokenizer()
    assert tokenizer.encode("abba") == [3, 2, 1] and tokenizer.decode([3, 2, 1]) == "abba"
    assert tokenizer.eos_tokens == (0,) and tokenizer.special_tokens == {"<|end|>": 0}
    assert tokenizer.encode("a<|end|>", allow_special=True) == [1, 0]
