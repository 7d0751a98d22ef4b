"""Runs of training: they continue exactly, share their batch between processes, and learn."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from paceline.drafters.checkpoint import read_checkpoint
from paceline.errors import ConfigError, InputError, PacelineError
from paceline.train.capture import Capture
from paceline.train.losses import Objective
from paceline.train.report import RunLog, read_log
from paceline.train.run import DRAFTER_FILE, DrafterOptions, make_trainee
from paceline.train.samples import Sample, Samples
from paceline.train.state import TrainState
from paceline.train.trainer import Trainer, TrainSettings
from tests.train.data import random_samples, tiny_run, write

ROOT = Path(__file__).parents[2]


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    return write(tmp_path / "data.bin", random_samples(60))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state = TrainState.load(folder / "state.pt")
    assert state is not None
    return state.tensors


def same(left: Path, right: Path) -> bool:
    a, b = weights(left), weights(right)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def trainer_of(folder: Path, samples: list[Sample]) -> Trainer:
    """The trainer that `TrainingRun.train` makes."""
    run = tiny_run(folder)
    usable = Samples.usable(samples, run.settings.row_length, 258)
    state, config = run.state(usable.train)
    head = run.target.model.head_rows(state.draft_tokens)
    trainee = make_trainee(config, run.target.model.embedding, head, run.options.steps, run.settings.objective)
    if not state.tensors:
        state.tensors = trainee.initial(run.settings.seed)
    capture = Capture(run.target.model, config.features, state.draft_tokens)
    return Trainer(trainee, capture, usable, run.settings, state, folder, run.group)


def test_a_run_that_stops_and_continues_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    data = sorted(random_samples(60), key=lambda each: each.key)
    trainer_of(tmp_path / "whole", data).train()
    while True:
        trainer = trainer_of(tmp_path / "parts", data)
        before = trainer.state.steps
        trainer.train(stop_after=7)
        if trainer.state.steps == before:
            break
    whole = TrainState.load(tmp_path / "whole" / "state.pt")
    assert whole is not None and whole.steps > 14 and whole.tokens >= 6000
    assert same(tmp_path / "whole", tmp_path / "parts")


def test_a_killed_run_continues_to_the_same_weights(tmp_path: Path, samples: Path) -> None:
    program = (
        "import sys, torch; from pathlib import Path; from tests.train.data import tiny_run\n"
        "torch.set_num_threads(1)\n"
        "tiny_run(Path(sys.argv[1]), tokens=20000, save_minutes=0.002).train([Path(sys.argv[2])])"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "killed"), str(samples)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    state = tmp_path / "killed" / "state.pt"
    deadline = time.monotonic() + 60
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = TrainState.load(state)
    assert found is not None and 0 < found.tokens < 20000
    subprocess.run(command, cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
    subprocess.run(
        [*command[:3], str(tmp_path / "whole"), str(samples)], cwd=ROOT, check=True, stderr=subprocess.DEVNULL
    )
    assert same(tmp_path / "killed", tmp_path / "whole")


def test_two_processes_train_as_one(tmp_path: Path, samples: Path) -> None:
    torch.set_num_threads(1)
    alone = tiny_run(tmp_path / "one", micro_rows=1).train([samples])
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "-m", "tests.train.data"]
    launcher = [sys.executable, *launcher[:4], "--standalone", *launcher[6:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*launcher, str(tmp_path / "two"), str(samples)], cwd=ROOT, check=True, env=environment)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=2e-3, rtol=1e-2)
    together = json.loads((tmp_path / "two" / "card.json").read_text())
    assert (together["tokens"], together["steps"]) == (alone["tokens"], alone["steps"])
    assert together["evaluation"]["loss"] == pytest.approx(alone["evaluation"]["loss"], abs=0.02)


def test_micro_batches_do_not_change_the_result(tmp_path: Path, samples: Path) -> None:
    for rows in (1, 4):
        tiny_run(tmp_path / str(rows), micro_rows=rows, tokens=1000).train([samples])
    one, four = weights(tmp_path / "1"), weights(tmp_path / "4")
    for name in one:
        torch.testing.assert_close(one[name], four[name], atol=1e-3, rtol=1e-2)


def test_training_learns_and_leaves_a_drafter_a_card_and_a_log(tmp_path: Path, samples: Path) -> None:
    run = tiny_run(tmp_path, tokens=40000, log_seconds=0.2)
    card = run.train([samples])
    log = [line for line in read_log(tmp_path / "log.jsonl") if line["kind"] == "train"]
    losses, quarter = [line["loss"][0] for line in log], max(1, len(log) // 4)
    assert sum(losses[-quarter:]) < 0.98 * sum(losses[:quarter])
    assert card["tokens"] >= 40000 and card["data"]["train"] + card["data"]["held_out"] == 60
    assert card["epochs"] > 10 and set(card["evaluation"]["by_task"]) == {"code"}
    text = (tmp_path / "card.md").read_text()
    assert "identity" in text and "| code |" in text
    drafter = read_checkpoint(tmp_path / DRAFTER_FILE)
    assert drafter.config.target_digest == "identity" and drafter.config.draft_vocab_size == 64
    assert drafter.draft_tokens is not None and int(drafter.draft_tokens.max()) == 257
    torch.testing.assert_close(drafter.tensors["fc.weight"], weights(tmp_path)["fc.weight"].bfloat16())


@pytest.mark.parametrize("kind", ["tv", "lk", "ce"])
def test_every_loss_trains(tmp_path: Path, samples: Path, kind: str) -> None:
    before = tiny_run(tmp_path, tokens=1, objective=Objective(kind)).train([samples])
    after = tiny_run(tmp_path, tokens=20000, objective=Objective(kind)).train([samples])
    assert after["steps"] > before["steps"] > 0


def test_a_run_ends_in_time(tmp_path: Path, samples: Path) -> None:
    started = time.monotonic()
    card = tiny_run(tmp_path, tokens=None, minutes=0.05).train([samples])
    assert card["steps"] > 0 and time.monotonic() - started < 10


def test_a_folder_of_another_drafter_is_refused(tmp_path: Path, samples: Path) -> None:
    tiny_run(tmp_path, tokens=100).train([samples])
    with pytest.raises(ConfigError, match="trains another drafter: its layer"):
        tiny_run(tmp_path, options=DrafterOptions(draft_vocab_size=64, intermediate_size=32, steps=3)).train([samples])
    (tmp_path / "state.pt").write_bytes(b"damaged")
    with pytest.raises(InputError, match="cannot be read"):
        tiny_run(tmp_path).train([samples])


def test_both_optimizers_continue_from_their_own_state_alone(tmp_path: Path, samples: Path) -> None:
    for kind, names in (("muon", {"adamw", "muon"}), ("adamw", {"adamw"})):
        tiny_run(tmp_path / kind, tokens=1000, optimizer=kind).train([samples])
        state = TrainState.load(tmp_path / kind / "state.pt")
        assert state is not None and state.optimizer.keys() == names
        card = tiny_run(tmp_path / kind, tokens=2000, optimizer=kind).train([samples])
        assert card["tokens"] > state.tokens
    older = TrainState.load(tmp_path / "adamw" / "state.pt")
    assert older is not None
    older.optimizer = older.optimizer["adamw"]  # as it was saved before there was a choice
    older.save(tmp_path / "adamw" / "state.pt")
    tiny_run(tmp_path / "adamw", tokens=3000, optimizer="adamw").train([samples])
    with pytest.raises(ConfigError, match="saved with the optimizer muon, not adamw"):
        tiny_run(tmp_path / "muon", tokens=3000, optimizer="adamw").train([samples])
    with pytest.raises(ConfigError, match="there is no optimizer 'sgd'"):
        TrainSettings(tokens=1, optimizer="sgd")


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, random_samples(60))
    trainer.train(stop_after=2)
    before = (tmp_path / "state.pt").read_bytes()
    with torch.no_grad():
        next(iter(trainer.parameters.values()))[0] = torch.nan
    with pytest.raises(PacelineError, match=r"a weight is not finite.*state\.pt, or delete it"):
        trainer.save()
    assert (tmp_path / "state.pt").read_bytes() == before


def test_the_seed_decides_a_block_drafters_anchors(tmp_path: Path, samples: Path) -> None:
    options = DrafterOptions("dflash", 64, 48, steps=3, layers=1, markov_rank=8)
    for number, seed in enumerate((1, 1, 2)):
        torch.manual_seed(number)
        tiny_run(tmp_path / str(number), options=options, tokens=1000, seed=seed).train([samples])
    assert same(tmp_path / "0", tmp_path / "1") and not same(tmp_path / "0", tmp_path / "2")


def test_a_log_that_was_cut_short_is_read(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"tokens": 1}\n{"tokens": 2, "by_task": {"code": {}}')
    assert read_log(path) == [{"tokens": 1}]
    RunLog(path, 5, writes=True)
    assert path.read_text() == '{"tokens": 1}\n'
    path.write_text('{"tokens": \n{"tokens": 2}\n')
    with pytest.raises(InputError, match="is damaged"):
        read_log(path)


def test_nothing_to_learn_from_stops_a_run(tmp_path: Path) -> None:
    empty = [Sample(each.prompt_key, each.task, each.tokens, ()) for each in random_samples(20)]
    with pytest.raises(InputError, match="nothing to train on: 20 with an empty loss mask"):
        tiny_run(tmp_path).train([write(tmp_path / "data.bin", empty)])


def test_settings_that_cannot_train_are_refused(tmp_path: Path, samples: Path) -> None:
    with pytest.raises(ConfigError, match="needs an end"):
        TrainSettings()
    with pytest.raises(ConfigError, match="longer than the target's 4,096 positions"):
        tiny_run(tmp_path, row_length=5000).train([samples])
    with pytest.raises(ConfigError, match="4 heads cannot share 3 heads"):
        tiny_run(tmp_path, options=DrafterOptions("dflash", kv_heads=3)).train([samples])
    with pytest.raises(InputError, match="cannot be read"):
        tiny_run(tmp_path).train([samples], [tmp_path / "none.bin"])
    for changes, message in (
        ({"kind": "medusa"}, "no trainer of 'medusa' drafters"),
        ({"steps": 0}, "1 or more"),
        ({"markov_rank": -1}, "1 or more"),
        ({"kind": "dflash", "steps": 1}, "block has 2 tokens or more"),
    ):
        with pytest.raises(ConfigError, match=message):
            DrafterOptions(**changes)  # type: ignore[arg-type]
    rates = [TrainSettings(tokens=1).rate(each / 100) for each in range(101)]
    highest = TrainSettings(tokens=1).learning_rate
    assert rates[0] == 0 and max(rates) == pytest.approx(highest, rel=0.01) and rates[-1] == pytest.approx(0)
