"""Stored tensors decode to the rows and columns of a shard, reading no more than they must, and to a Quantised weight."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch

from paceline.errors import BadWeights, ConfigError
from paceline.models import stored as module
from paceline.models.checkpoint import open_checkpoint
from paceline.models.config import Shard
from paceline.models.decoder import Decoder
from paceline.models.stored import BlockTensor, PlainTensor, StoredTensor, run_ahead
from paceline.ops.quantised import FORMATS, decode
from tests.models.test_config import directory, values
from tests.models.test_gguf import whole_model, write
from tests.ops.test_weight import COLUMNS, ROWS, blocks
from tests.tiny import random_tensors, tiny_config

CPU = torch.device("cpu")
PARTS = [
    (slice(0, 66), slice(0, 512)),
    (slice(22, 44), slice(0, 512)),
    (slice(0, 66), slice(256, 512)),
    (slice(1, 2), slice(7, 300)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", FORMATS)
def test_parts_of_blocks_are_those_of_the_whole(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SLICE", 5000)
    tensor = BlockTensor(blocks(kind), kind, (ROWS, COLUMNS))
    whole = decode(blocks(kind), kind).to(dtype)
    assert tensor.decode().dtype == FORMATS[kind].dtype and torch.equal(tensor.decode(dtype), whole)
    for rows, columns in PARTS:
        assert torch.equal(tensor.decode(dtype, rows, columns), whole[rows, columns])


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q6_K"])
def test_rows_of_interleaved_heads_are_put_back_within_a_shard(kind: str) -> None:
    data = blocks(kind)[:64]
    tensor = BlockTensor(data, kind, (64, COLUMNS), permuted_rows=16)
    order = torch.arange(64).view(4, 8, 2).swapaxes(1, 2).flatten()
    whole = decode(data, kind)[order]
    assert torch.equal(tensor.decode(), whole)
    assert torch.equal(tensor.decode(rows=slice(16, 48)), whole[16:48])
    assert torch.equal(tensor.quantised(slice(16, 48)).decoded(torch.float32).matrix, whole[16:48].float())
    assert tensor.quantised().data.data_ptr() != data.data_ptr()


def test_only_whole_blocks_of_a_column_shard_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Size] = []
    monkeypatch.setattr(module, "decode", lambda data, kind: seen.append(data.shape) or decode(data, kind))
    tensor = BlockTensor(blocks("Q4_K"), "Q4_K", (ROWS, COLUMNS))
    tensor.decode(columns=slice(256, 512))
    tensor.decode(columns=slice(128, 256))
    assert [each[1] for each in seen] == [144, 288]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_parts_of_safetensors_and_of_plain_tensors(dtype: torch.dtype, tmp_path: Path) -> None:
    matrix, vector = torch.randn(ROWS, COLUMNS).to(dtype), torch.randn(ROWS).to(dtype)
    directory(tmp_path, values(), {"matrix": matrix, "vector": vector})
    found = dict(open_checkpoint(tmp_path).stored())
    for stored in (found, {"matrix": PlainTensor(matrix), "vector": PlainTensor(vector)}):
        assert stored["matrix"].shape == (ROWS, COLUMNS) and stored["vector"].dtype == dtype
        assert torch.equal(stored["vector"].decode(), vector)
        assert torch.equal(stored["vector"].decode(torch.float64, slice(3, 9)), vector[3:9].double())
        for rows, columns in PARTS:
            assert torch.equal(stored["matrix"].decode(None, rows, columns), matrix[rows, columns])


def test_jobs_run_ahead_of_the_caller_by_so_many_tensors_and_in_any_thread() -> None:
    begun, caller = [], threading.get_ident()

    def job(number: int) -> None:
        time.sleep(0.001)
        begun.append((number, threading.get_ident() != caller))

    found = []
    for number in run_ahead((index, [lambda index=index: job(index)] * 2, 4) for index in range(40)):  # type: ignore[misc]
        assert [each for each, _ in begun].count(number) == 2
        assert max(each for each, _ in begun) <= number + 16 // 4 + 1
        found.append(number)
    assert found == list(range(40)) and all(elsewhere for _, elsewhere in begun)


def test_an_error_in_a_job_reaches_the_caller() -> None:
    def fails() -> None:
        raise BadWeights("a damaged block")

    with pytest.raises(BadWeights, match="damaged"):
        list(run_ahead(iter([("a", [fails], 1)])))


def test_a_model_keeps_its_dtype_or_takes_the_one_given(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path / "m.gguf", whole_model("llama")[1], vocab=16))
    assert Decoder(checkpoint.config, checkpoint.stored(), CPU).dtype == torch.float32
    assert Decoder(checkpoint.config, checkpoint.stored(), CPU, torch.bfloat16).dtype == torch.bfloat16


def test_neighbours_of_different_widths_are_bad_weights() -> None:
    config = tiny_config("qwen2")
    tensors: dict[str, torch.Tensor | StoredTensor] = dict(random_tensors(config))
    tensors["model.layers.1.self_attn.k_proj.weight"] = torch.zeros(16, 31)
    with pytest.raises(BadWeights, match=r"layers\.1\.self_attn\.k_proj\.weight.*31"):
        Decoder(config, tensors.items(), CPU)


@pytest.mark.parametrize(
    ("size", "message"), [(3, "3 shards cannot split this model: it has 4 heads"), (4, "it has 2 KV heads")]
)
def test_a_shard_that_does_not_divide_is_refused(size: int, message: str) -> None:
    config = tiny_config("qwen2")
    with pytest.raises(ConfigError, match=message):
        Decoder(config, random_tensors(config), CPU, shard=Shard(0, size))
    with pytest.raises(ConfigError, match=r"no shard 2 of 2"):
        Shard(2, 2)
    with pytest.raises(ConfigError, match="63 MLP rows"):
        tiny_config("qwen2", intermediate_size=63).shard(2)


def test_each_shard_has_its_part_of_the_weights_and_of_the_cache() -> None:
    config = tiny_config("llama")
    whole = Decoder(config, random_tensors(config), CPU)
    parts = [Decoder(config, random_tensors(config), CPU, shard=Shard(rank, 2)) for rank in (0, 1)]
    assert [each.layout(8).page_bytes for each in parts] == [whole.layout(8).page_bytes // 2] * 2
    assert parts[0].config == config and torch.equal(parts[0].embedding, parts[1].embedding)
