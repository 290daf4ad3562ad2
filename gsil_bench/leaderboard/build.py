"""The generated files of a leaderboard: README.md, index.html and schema.json. Same entries, same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gsil_bench.leaderboard.board import Board
from gsil_bench.leaderboard.entries import SCHEMA_FILE
from gsil_bench.leaderboard.page import render_page
from gsil_bench.leaderboard.readme import render_readme
from gsil_bench.leaderboard.schema import schema_text
from gsil_bench.records import write_atomically


def generated(boards: Sequence[Board]) -> dict[str, str]:
    """Name → content of everything that is made of the entries."""
    return {"README.md": render_readme(boards), "index.html": render_page(boards), SCHEMA_FILE: schema_text()}


def build(folder: Path, boards: Sequence[Board]) -> list[Path]:
    """Write them, and say where."""
    files = {folder / name: text for name, text in generated(boards).items()}
    for path, text in files.items():
        write_atomically(path, text)
    return list(files)
