"""The unrolled network is what an engine computes from a root on."""

from __future__ import annotations

import torch
from torch import Tensor

from paceline.drafters.eagle3 import Eagle3Network
from paceline.models.decoder import Decoder
from paceline.models.rope import rope_table
from paceline.ops.dispatch import differentiable
from paceline.ops.rope import rotate
from paceline.train.capture import Capture, Captured
from paceline.train.eagle3 import Eagle3Trainee, eagle3_config
from paceline.train.losses import Acceptance, Objective
from paceline.train.packing import PackedRows, Packing
from tests.tiny import random_tensors, tiny_config
from tests.train.data import random_samples

STEPS = 5


def target(**changes: object) -> Decoder:
    config = tiny_config(num_layers=6, **changes)
    return Decoder(config, random_tensors(config), torch.device("cpu"))


def trainee_of(model: Decoder, draft_ids: Tensor) -> Eagle3Trainee:
    config = eagle3_config(model.config, "", len(draft_ids), 48)
    return Eagle3Trainee(config, model.embedding, model.head_rows(draft_ids), STEPS, Objective())


def packed() -> PackedRows:
    packing = Packing(random_samples(7, length=30), 64, 0, ["code"])
    return packing.pack(packing.epoch(0)[:2])


def captured(model: Decoder, trainee: Eagle3Trainee, draft_ids: Tensor, rows: PackedRows) -> Captured:
    return Capture(model, trainee.config.features, draft_ids)(rows)


class Simulation:
    """Inference by the definition: one row at a time, over a list of the keys and values of the rows before but the first."""

    def __init__(self, network: Eagle3Network, embedding: Tensor) -> None:
        self.network, self.embedding = network, embedding
        self.layer = network.config.layer
        self.table = rope_table(self.layer, 128)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def row(self, token: Tensor, state: Tensor) -> Tensor:
        def attend(qkv: Tensor) -> Tensor:
            layer = self.layer
            heads = qkv.view(-1, layer.head_dim)
            cosines, sines = self.table[len(self.keys)].chunk(2)
            turned, value = heads.split([layer.num_heads + layer.num_kv_heads, layer.num_kv_heads])
            query, key = rotate(turned[None], cosines[None, None], sines[None, None])[0].split(
                [layer.num_heads, layer.num_kv_heads]
            )
            self.keys.append(key)
            self.values.append(value)
            group = layer.num_heads // layer.num_kv_heads
            seen = slice(min(1, len(self.keys) - 1), None)
            keys, values = (torch.stack(each[seen]).repeat_interleave(group, 1) for each in (self.keys, self.values))
            scores = torch.einsum("hd,thd->ht", query, keys) / layer.head_dim**0.5
            return torch.einsum("ht,thd->hd", scores.softmax(-1), values).reshape(1, -1)

        return self.network.forward(token[None], self.embedding, state[None], attend)[0]

    def forget(self, length: int) -> None:
        del self.keys[length:], self.values[length:]


def test_unrolled_steps_are_those_of_sequential_inference() -> None:
    model = target()
    ids = torch.arange(0, 258, 2)
    trainee = trainee_of(model, ids)
    rows = packed()
    batch = captured(model, trainee, ids, rows)
    compared = 0
    with torch.no_grad(), differentiable():
        tensors = trainee.initial(1)
        network = Eagle3Network(trainee.config, tensors, model.head_rows(ids), training=True)
        unrolled = list(trainee.unrolled(network, batch))
        fused = network.fuse(batch.features)
        flat = batch.tokens.flatten()
        for first, last in zip(rows.bounds, rows.bounds[1:], strict=False):
            tokens = flat[first:last]
            for root in range(last - first):
                simulation = Simulation(network, model.embedding)
                for j in range(root + 1):
                    state = fused[first + j - 1] if j else torch.zeros_like(fused[0])
                    state = simulation.row(tokens[j], state)
                for k in range(min(STEPS, last - first - root)):
                    if k:
                        state = simulation.row(tokens[root + k], state)
                    torch.testing.assert_close(unrolled[k][first + root], state, atol=1e-5, rtol=1e-5)
                    compared += 1
    assert compared > 100


def test_captured_distributions_are_the_targets() -> None:
    model = target(tie_embeddings=False)
    ids = torch.arange(1, 258, 3)
    rows = packed()
    trainee = trainee_of(model, ids)
    batch = captured(model, trainee, ids, rows)
    for n in range(rows.num_supervised):
        place = int(rows.places[n])
        first = max(bound for bound in rows.bounds if bound <= place)
        alone = PackedRows(
            rows.tokens.reshape(1, -1)[:, first : place + 1],
            rows.positions.reshape(1, -1)[:, first : place + 1],
            rows.documents.reshape(1, -1)[:, first : place + 1],
            [0, place + 1 - first],
            rows.places[:1] * 0 + place - first,
            rows.weights[:1],
            rows.follows[:1],
            rows.depths[:1],
            rows.tasks[:1],
            place + 1 - first,
        )
        single = captured(model, trainee, ids, alone)
        torch.testing.assert_close(batch.logits[n], single.logits[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(batch.normaliser[n], single.normaliser[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(batch.features[place], single.features[place - first], atol=1e-4, rtol=1e-4)
        assert batch.depths[n] == place - first
    torch.testing.assert_close(model.head_rows(ids), model.head.matrix[ids])  # type: ignore[union-attr]


def test_loss_has_gradients_of_every_tensor_and_counts_of_every_position() -> None:
    model = target()
    ids = torch.arange(258)
    trainee = trainee_of(model, ids)
    batch = captured(model, trainee, ids, packed())
    tensors = {name: tensor.requires_grad_() for name, tensor in trainee.initial(0).items()}
    acceptance = Acceptance(1, STEPS, torch.device("cpu"))
    trainee.loss(tensors, batch, acceptance).backward()
    assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in tensors.values())
    rows = acceptance.counts[0, :, 0].tolist()
    assert rows[0] == batch.weights.sum() and rows == sorted(rows, reverse=True)
