"""Two processes with a shard each, and an all-reduce between them, compute what the whole model computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from torch import Tensor

from paceline.models.checkpoint import open_checkpoint
from paceline.models.config import Shard
from paceline.models.decoder import Decoder
from tests.models.test_features import run
from tests.models.test_gguf import whole_model, write
from tests.models.test_logits import assert_near, decoder, reference

CPU = torch.device("cpu")
WANT = (1, 2)


def all_reduce(partial: Tensor) -> Tensor:
    torch.distributed.all_reduce(partial)
    return partial


def serve(rank: int, size: int, folder: str, models: list[str]) -> None:
    """One process: the logits and features of its shard of each model, in a file of its own."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=size)
    found = []
    for each in models:
        checkpoint = open_checkpoint(Path(each))
        model = Decoder(
            checkpoint.config, checkpoint.stored(), CPU, torch.float32, shard=Shard(rank, size), all_reduce=all_reduce
        )
        model.prepare(64)
        output = run(model, [4, 19], WANT, checkpoint.config.vocab_size - 1)
        found.append((output.logits, output.features, model.layout(8).page_bytes))
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_shards_are_one_model(tmp_path: Path) -> None:
    models = []
    for kind, changes in (
        ("Qwen2", {}),
        ("Qwen3", {"head_dim": 16}),
        ("Qwen3Moe", {"moe_intermediate_size": 40, "num_experts": 5, "num_experts_per_tok": 2}),
    ):
        models.append(str(tmp_path / kind))
        reference(kind, num_hidden_layers=2, **changes).save_pretrained(models[-1])
    models.append(str(write(tmp_path / "m.gguf", whole_model("llama")[1], vocab=16)))  # with rows to put back in order
    torch.multiprocessing.spawn(serve, (2, str(tmp_path), models), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for path, one, other in zip(models, first, second, strict=True):
        whole = decoder(open_checkpoint(Path(path)))
        expected = run(whole, [4, 19], WANT, whole.config.vocab_size - 1)
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
        assert_near(one[0], expected.logits)
        assert_near(one[1], expected.features)
        assert one[2] == other[2] == whole.layout(8).page_bytes // 2


def test_a_single_shard_with_an_all_reduce_has_the_bits_of_the_whole(tmp_path: Path) -> None:
    """The split form of a product with its residual, where nothing is summed over ranks."""
    reference("Llama").save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    models = [Decoder(checkpoint.config, checkpoint.stored(), CPU, all_reduce=each) for each in (None, lambda x: x)]
    for each in models:
        each.prepare(64)
    outputs = [run(each, None, (3,)) for each in models]
    assert torch.equal(outputs[0].logits, outputs[1].logits) and torch.equal(outputs[0].features, outputs[1].features)
