"""Trained drafters with weights in float8: the network of the rounded matrices, and an output that stays the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from paceline.drafters import trained
from paceline.drafters.dflash import DFlashNetwork
from paceline.drafters.eagle3 import Eagle3Network
from paceline.ops.weight import Dense, Float8, Packed, Weight, prepare, row_scaled
from paceline.types import Request, Sampling
from tests.drafters.tiny_checkpoints import dflash_config, eagle3_config, engine_with, random_dflash, random_eagle3
from tests.tiny import tiny_config, tiny_engine


@pytest.fixture
def float8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafters round their weights as on a GPU; the ops' references decode them."""
    monkeypatch.setattr(trained, "takes_float8", lambda matrix: True)


def weights_of(network: object) -> dict[str, Weight]:
    """Every weight of a network and its layers, by name."""
    found: dict[str, Weight] = {}
    found |= {name: each for name, each in vars(network).items() if isinstance(each, Dense | Packed | Float8)}
    for index, layer in enumerate(getattr(network, "layers", ())):
        found |= {f"{index}.{name}": each for name, each in weights_of(layer).items()}
    return found


def rounded(tensor: Tensor) -> Tensor:
    return Float8(*row_scaled(tensor)).decoded(torch.float32).matrix if tensor.dim() == 2 else tensor


def attend(*arguments: int | Tensor) -> Tensor:
    """Of queries, keys and values in a row the queries: attention to itself would do as well."""
    qkv = arguments[-1]
    assert isinstance(qkv, Tensor)
    return qkv[:, :32]


def test_on_the_cpu_nothing_changes() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.randn(64, 64).to(dtype)
        assert type(trained.rounded(matrix)) is type(prepare(matrix))


@pytest.mark.usefixtures("float8")
@torch.inference_mode()
def test_an_eagle3_network_is_that_of_its_rounded_matrices() -> None:
    config = eagle3_config(tiny_config())
    tensors, hidden = random_eagle3(config), config.layer.hidden_size
    torch.manual_seed(1)
    head, embedding = torch.randn(config.draft_vocab_size, hidden), torch.randn(config.layer.vocab_size, hidden)
    network = Eagle3Network(config, tensors, head)
    exact = Eagle3Network(config, {name: rounded(each) for name, each in tensors.items()}, rounded(head), training=True)
    assert all(isinstance(each, Float8) for each in weights_of(network).values())
    tokens, features = torch.tensor([3, 50, 7]), torch.randn(3, 3 * config.target_hidden_size)

    def logits(network: Eagle3Network) -> Tensor:
        return network.logits(network.forward(tokens, embedding, network.fuse(features), attend))

    torch.testing.assert_close(logits(network), logits(exact))


@pytest.mark.usefixtures("float8")
@torch.inference_mode()
def test_a_dflash_network_is_that_of_its_rounded_matrices() -> None:
    config = dflash_config(tiny_config())
    tensors = random_dflash(config)
    torch.manual_seed(1)
    head = torch.randn(config.draft_vocab_size, config.layer.hidden_size)
    kept = ("markov_head.", "confidence_head.")
    exact_tensors = {name: each if name.startswith(kept) else rounded(each) for name, each in tensors.items()}
    network, exact = DFlashNetwork(config, tensors, head), DFlashNetwork(config, exact_tensors, rounded(head), True)
    dense = [name for name, each in weights_of(network).items() if not isinstance(each, Float8)]
    assert dense == ["_markov_output"]
    tokens, embedded = torch.tensor([3, 50, 7]), torch.randn(3, config.layer.hidden_size)

    def logits(network: DFlashNetwork) -> Tensor:
        return network.logits(network.forward(embedded.clone(), attend)) + network.markov(tokens)

    torch.testing.assert_close(logits(network), logits(exact))


@pytest.mark.usefixtures("float8")
@pytest.mark.parametrize("drafter", ["eagle3", "dflash", "joint"])
def test_the_output_is_that_without_drafts(drafter: str, tmp_path: Path) -> None:
    requests = [
        Request([7, 90, 7, 90, 7], Sampling(max_tokens=24, ignore_eos=True)),
        Request(list(range(40, 70)), Sampling(max_tokens=24, ignore_eos=True, temperature=0.8, seed=5)),
    ]
    expected = [each.tokens for each in tiny_engine(drafter="none").generate(requests)]
    engine = engine_with(drafter, tmp_path, fixed_draft=4)
    assert [each.tokens for each in engine.generate(requests)] == expected
