"""The data set's files: where they are, and their records."""

from __future__ import annotations

import gzip
import json
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT

GIT_EDITS = "edits/git_edits.jsonl.gz"


def data_folder() -> Path:
    """The folder named by PACELINE_DATA, or shared/data beside the checkout."""
    return Path(os.environ.get("PACELINE_DATA", ROOT.parent / "shared" / "data"))


def data_path(relative: str) -> Path:
    """A file of the data set. Exits with one sentence if it is absent."""
    path = data_folder() / relative
    if not path.exists():
        sys.exit(
            f"the data file {relative} is not in {data_folder()}; "
            "name another file with the option, or set PACELINE_DATA to the data set's folder"
        )
    return path


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a .jsonl or .jsonl.gz file."""
    if not path.exists():
        sys.exit(f"there is no file {path}")
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def load_edits(
    path: Path | None, split: str | None = "dev", limit: int | None = None, longest: int = 2500
) -> list[dict[str, Any]]:
    """Edits in the form of git_edits.jsonl.gz with at most `longest` tokens before and after; all splits for None."""
    records = read_records(path or data_path(GIT_EDITS))
    chosen = [
        record
        for record in records
        if (split is None or record.get("split", split) == split)
        and max(record.get("before_tok", 0), record.get("after_tok", 0)) <= longest
    ]
    return chosen[:limit]
