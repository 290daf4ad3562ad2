"""The digest of a loss's source: what changes it, and what does not."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gsil_bench.source import source_sha256


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "lab_of_tests"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "helper.py").write_text("K = 1.0\n")
    (folder / "unrelated.py").write_text("")
    (folder / "loss.py").write_text("import torch\n\ndef loss(pair):\n    from lab_of_tests.helper import K\n    return K\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    for name in [name for name in sys.modules if name.startswith("lab_of_tests")]:
        del sys.modules[name]


def test_a_lazily_imported_helper_counts_before_and_after_it_is_loaded(lab: Path) -> None:
    before = source_sha256("lab_of_tests.loss")
    __import__("lab_of_tests.loss")
    __import__("lab_of_tests.helper")
    assert source_sha256("lab_of_tests.loss") == before
    (lab / "helper.py").write_text("K = -3.0\n")
    assert source_sha256("lab_of_tests.loss") != before


def test_what_is_not_imported_does_not_count(lab: Path) -> None:
    before = source_sha256("lab_of_tests.loss")
    (lab / "unrelated.py").write_text("x = 1\n")
    assert source_sha256("lab_of_tests.loss") == before
    assert source_sha256("lab_of_tests.loss") != source_sha256("lab_of_tests.helper")
