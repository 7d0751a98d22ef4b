"""benchmarks/drafters.py: curves of several runs from their logs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import drafters


def evaluation(tokens: int, length: float, **changes: Any) -> dict[str, Any]:
    rates = {"length": length, "acceptance": [0.8, 0.6]}
    tasks = {"edit": {**rates, "length": length + 1}, "": rates}
    return {"kind": "evaluation", "tokens": tokens, "epoch": tokens // 1_000_000, **rates, "by_task": tasks, **changes}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A run that went on in another folder, and a short one with a longer block."""
    logs = {
        "first": [
            evaluation(400_000, 1.5),
            evaluation(1_600_000, 2.5),
            {"kind": "train", "tokens": 1_600_000, "length": 2.75},
        ],
        "second": [evaluation(2_500_000, 3.0), {"kind": "train", "tokens": 2_500_000, "length": 3.256}],
        "short": [
            evaluation(20_000, 1.1),
            evaluation(600_000, 2.0, acceptance=[0.9, 0.8, 0.7], by_task={"edit": {"length": 2.0}}),
        ],
    }
    for name, lines in logs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_tables_are_of_the_logs(runs: Path) -> None:
    curves = drafters.read_curves(
        [f"all={runs / 'second'}", f"all={runs / 'first' / 'log.jsonl'}", str(runs / "short")]
    )
    assert [curve.name for curve in curves] == ["all", "short"]
    both, short = drafters.over_tokens(curves)
    # at 800,000 tokens the way from 400,000 to 1,600,000 is half, since their logarithms count
    assert curves[0].length_at(800_000) == pytest.approx(2.0) and curves[0].length_at(399_999) is None
    assert (both["1M"], both["2M"], both["at the end"], both["trained on"]) == (2.16, 2.75, 3.0, 3.26)
    assert (both["tokens seen"], both["passes"]) == ("2.5M", 2)
    assert (short["0.5M"], short["1M"], short["tokens seen"], short["trained on"]) == (1.95, None, "0.6M", None)
    assert drafters.by_task(curves) == [
        {"run": "all", "all": 3.0, "-": 3.0, "edit": 4.0},
        {"run": "short", "all": 2.0, "-": None, "edit": 2.0},
    ]
    positions = drafters.markdown(drafters.by_position(curves)).splitlines()
    assert positions[0] == "| run | 1 | 2 | 3 |" and positions[2:] == [
        "| all | 0.8 | 0.6 |  |",
        "| short | 0.9 | 0.8 | 0.7 |",
    ]


def test_the_command_writes_a_figure(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "images"
    monkeypatch.setattr("sys.argv", ["drafters", "--logs", str(runs / "first"), str(runs / "short"), "--out", str(out)])
    drafters.main()
    printed = capsys.readouterr().out
    assert "| first |" in printed and json.loads(printed.splitlines()[-1])["benchmark"] == "drafters"
    figure = (out / drafters.FIGURE).read_bytes()
    assert figure.startswith(b"<?xml") and b"tokens seen" in figure
    drafters.main()
    assert (out / drafters.FIGURE).read_bytes() == figure


def test_runs_without_a_curve_are_named(runs: Path) -> None:
    (runs / "short" / "log.jsonl").write_text(json.dumps({"kind": "train", "tokens": 5, "length": 1.0}) + "\n")
    with pytest.raises(SystemExit, match="has no evaluation"):
        drafters.read_curves([str(runs / "short")])
    with pytest.raises(SystemExit, match="there is no log at"):
        drafters.read_curves(["name=nowhere"])
