"""The commands `paceline train ...` from prompts to a drafter, over a tiny model on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from paceline.cli import app
from paceline.drafters.checkpoint import check_target, read_checkpoint
from paceline.errors import ConfigError, InputError, PacelineError
from paceline.models.checkpoint import open_checkpoint
from paceline.train.run import DRAFTER_FILE
from paceline.train.samples import read_samples
from tests.models.test_config import values as config_values
from tests.models.test_tokenizer import backend
from tests.tiny import random_tensors, tiny_config
from tests.train.prompt_files import write_data, write_wheel

SHAPES = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "vocab_size": 480}
OPTIONS = ["--draft-vocab", "64", "--intermediate", "32", "--unroll", "2", "--row-length", "128", "--max-tokens", "24"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    backend().save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(config_values(**SHAPES, rms_norm_eps=1e-6)))
    save_file(
        dict(random_tensors(tiny_config("llama", vocab_size=480, tie_embeddings=False))), folder / "model.safetensors"
    )
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    lines = [{"prompt": f"def f{number}(", "task": "continue"} for number in range(30)]
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"task": "no prompt"}]))
    return path


def train(*arguments: object) -> Result:
    return run("train", *arguments, "--device", "cpu")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


def test_one_command_generates_trains_and_continues(tmp_path: Path, model: Path, prompts: Path) -> None:
    run = tmp_path / "run"
    (tmp_path / "sources.json").write_text(json.dumps({"files": {"prompts.jsonl": {"contamination": {"removed": 3}}}}))
    command = ["drafter", model, "--prompts", prompts, "--out", run, *OPTIONS]
    done = train(*command, "--tokens", 3000)
    assert done.exit_code == 0, done.output
    assert "30 prompts" in done.stderr and "has neither messages nor a prompt (lines 31)" in done.stderr
    assert "tokens seen" in done.stdout
    target = open_checkpoint(model)
    drafter = read_checkpoint(run / DRAFTER_FILE)
    check_target(drafter, target.config, target.identity)
    first = json.loads((run / "card.json").read_text())
    assert first["target_digest"] == target.identity and first["data"]["by_task"] == {
        "continue": first["data"]["train"]
    }
    assert first["sources"]["contamination"] == {"removed": 3}
    assert "3 were removed" in (run / "card.md").read_text() and drafter.card["sources"] == first["sources"]
    done = train(*command, "--tokens", 6000)
    assert done.exit_code == 0 and "its samples stay as they are" in done.stderr
    second = json.loads((run / "card.json").read_text())
    assert second["tokens"] >= 6000 > first["tokens"] >= 3000


def test_samples_are_written_alone_and_given_texts_used(tmp_path: Path, model: Path, prompts: Path) -> None:
    file = tmp_path / "samples.bin"
    assert train("samples", model, "--prompts", prompts, "--out", file, "--max-tokens", 24).exit_code == 0
    assert len(read_samples(file)) == 30
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"def f{number}(): return {number}"}) + "\n" for number in range(9)))
    given = tmp_path / "given.bin"
    assert train("samples", model, "--prompts", texts, "--out", given, "--given").exit_code == 0
    assert all(each.num_supervised == len(each.tokens) - 1 for each in read_samples(given))
    command = ["drafter", model, "--samples", given, *OPTIONS, "--tokens", 1000]
    for more, train_count, held_out_count in ((["--samples", file], None, None), (["--held-out", file], 9, 30)):
        run = tmp_path / more[0].strip("-")
        done = train(*command, *more, "--out", run)
        assert done.exit_code == 0, done.output
        data = json.loads((run / "card.json").read_text())["data"]
        assert data["train"] + data["held_out"] == 39
        assert train_count is None or (data["train"], data["held_out"]) == (train_count, held_out_count)


def test_training_goes_on_from_a_drafter_and_is_evaluated(tmp_path: Path, model: Path, prompts: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    sizes = [each for each in OPTIONS if each not in ("--draft-vocab", "64", "--intermediate", "32")]
    assert train("drafter", model, "--prompts", prompts, "--out", first, *OPTIONS, "--tokens", 2000).exit_code == 0
    samples, start = first / "samples.bin", first / DRAFTER_FILE
    command = ["drafter", model, "--samples", samples, "--out", second, "--from", start, "--tokens", 4000]
    assert isinstance(train(*command, *OPTIONS, "--kind", "dflash").exception, ConfigError)
    done = train(*command, *sizes)
    assert done.exit_code == 0, done.output
    card = json.loads((second / "card.json").read_text())
    assert card["tokens"] >= 4000 and card["tokens_before"] == json.loads((first / "card.json").read_text())["tokens"]
    assert (card["draft_vocab_size"], card["config"]["layer"]["intermediate_size"]) == (64, 32)

    evaluate = ["evaluate", "drafter", second / DRAFTER_FILE, "--model", model, "--unroll", "2", "--row-length", "128"]
    of_samples = run(*evaluate, "--samples", samples)
    of_held_out = run(*evaluate, "--samples", samples, "--held-out")
    of_prompts = run(*evaluate, "--prompts", prompts, "--max-tokens", "24")
    for each in (of_samples, of_held_out, of_prompts):
        assert each.exit_code == 0 and each.stdout.startswith("task "), each.output
    found, held_out, generated = (
        json.loads(each.stdout.splitlines()[-1]) for each in (of_samples, of_held_out, of_prompts)
    )
    assert found["samples"] == 30 and found["kind"] == "eagle3" and len(found["acceptance"]) == 2
    assert held_out["samples"] == card["data"]["held_out"] < 30
    assert held_out["loss"] == pytest.approx(card["evaluation"]["loss"], rel=0.02)
    assert generated["loss"] == found["loss"]  # the same outputs, generated again
    assert isinstance(run(*evaluate).exception, InputError)


def test_a_drafter_is_exported(tmp_path: Path, model: Path, prompts: Path) -> None:
    folder, out = tmp_path / "run", tmp_path / "exported"
    assert train("drafter", model, "--prompts", prompts, "--out", folder, *OPTIONS, "--tokens", 500).exit_code == 0
    command = ["export", folder / DRAFTER_FILE, out, "--model", model, "--format"]
    done = run(*command, "vllm", "--target-name", "owner/name")
    assert done.exit_code == 0 and done.stdout.split() == [str(out)]
    assert "owner/name" in (out / "config.json").read_text()
    exported, source = read_checkpoint(out), read_checkpoint(folder / DRAFTER_FILE)
    assert exported.config == source.config and "lm_head.weight" in exported.tensors
    assert isinstance(run(*command, "gguf").exception, ConfigError)
    small = tmp_path / "small.safetensors"
    done = run(*command[:2], small, *command[3:], "paceline")
    assert done.exit_code == 0 and small.stat().st_size < (folder / DRAFTER_FILE).stat().st_size
    found = read_checkpoint(small)
    assert (found.config, found.card) == (source.config, source.card)
    for name, each in source.tensors.items():
        torch.testing.assert_close(found.tensors[name].float(), each.float(), atol=0.1, rtol=0.1)
    assert isinstance(run(*command[:2], small, *command[3:], "paceline").exception, ConfigError)


def test_prompts_are_written_with_their_sources(tmp_path: Path) -> None:
    data, packages, out = write_data(tmp_path / "data"), tmp_path / "packages", tmp_path / "out"
    for number in range(30):
        write_wheel(packages, f"pack{number}")
    command = ["train", "prompts", out, "--data", data, "--packages", packages, "--num", "60", "--validation", "10"]
    done = run(*command)
    assert done.exit_code == 0, done.output
    lines = (out / "prompts.jsonl").read_text().splitlines()
    assert not (out / "generic_text.jsonl").exists()
    assert len(lines) == 60 and f"{out / 'prompts.jsonl'}: 60 prompts" in done.stdout
    before = (out / "sources.json").read_bytes()
    assert run(*command).exit_code == 0 and (out / "sources.json").read_bytes() == before
    studied = run(*command, "--study")
    assert studied.exit_code == 0 and f"{out / 'eval_mbpp_last100.jsonl'}: 100 prompts" in studied.stdout
    assert (out / "generic_text.jsonl").stat().st_size > 0 and (out / "general_prompts.jsonl").stat().st_size > 0
    benchmark = tmp_path / "benchmark.jsonl"
    text = json.loads(lines[0])["messages"][0]["content"]
    benchmark.write_text(json.dumps({"text": text}) + "\n")
    assert run(*command, "--benchmarks", benchmark).exit_code == 0
    assert lines[0] not in (out / "prompts.jsonl").read_text().splitlines()


def test_what_cannot_be_trained_is_refused(tmp_path: Path, model: Path) -> None:
    out = tmp_path / "run"
    assert isinstance(train("drafter", model, "--out", out).exception, ConfigError)
    assert isinstance(train("drafter", model, "--out", out, "--tokens", 9, "--loss", "mse").exception, ConfigError)
    found = train("drafter", model, "--out", out, "--tokens", 9, *OPTIONS).exception
    assert isinstance(found, InputError) and "nothing to train on: there are no samples" in str(found)
    prompts = tmp_path / "prompts.jsonl"  # it is not there: what is refused first is the option
    command = ["drafter", model, "--prompts", prompts, "--out", out, "--tokens", 9, *OPTIONS]
    for more, message in (
        (["--kind", "medusa"], "no trainer of 'medusa'"),
        (["--kind", "dflash", "--loss", "tv"], "loss of its own"),
        (["--unroll", "0"], "1 or more"),
        (["--row-length", "1000000"], "longer than the target's"),
        (["--samples", tmp_path / "none.bin"], "cannot be read"),
        (["--held-out", tmp_path / "none.bin"], "cannot be read"),
        (["--from", tmp_path / "none.safetensors"], "there is no drafter at"),
    ):
        refused = train(*command, *more).exception
        assert isinstance(refused, PacelineError) and message in str(refused), more
        assert str(prompts) not in str(refused)
    missing = train("samples", model, "--prompts", tmp_path / "none", "--out", out / "samples.bin").exception
    assert isinstance(missing, InputError) and "cannot be read" in str(missing)
