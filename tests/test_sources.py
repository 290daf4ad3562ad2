"""Pinned data files: found where promised, never used unless their sha256 is the pinned one. No test reaches a network."""

from __future__ import annotations

import hashlib
import io
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from gsil_bench.data import sources
from gsil_bench.data.sources import SOURCES, Source, cache_folder, locate
from gsil_bench.errors import UserError

RIGHT = b"the pinned bytes\n"
WRONG = b"other bytes\n"


def source(*urls: str) -> Source:
    """A source whose file holds RIGHT."""
    return Source("toy", "folder/toy.txt", hashlib.sha256(RIGHT).hexdigest(), urls, "MIT")


def put(folder: Path, content: bytes) -> Path:
    """Write the toy source's file into a data folder."""
    path = folder / "folder/toy.txt"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    return path


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, no data variable, and no network."""

    def refuse(url: str, **_: Any) -> None:
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("GSIL_BENCH_DATA", raising=False)
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    return tmp_path


def serve(monkeypatch: pytest.MonkeyPatch, pages: dict[str, bytes]) -> list[str]:
    """Replace the network by pages; returns the list of addresses asked for."""
    asked: list[str] = []

    def urlopen(url: str, timeout: float) -> io.BytesIO:
        asked.append(url)
        if url not in pages:
            raise urllib.error.HTTPError(url, 404, "Not Found", None, None)  # type: ignore[arg-type]
        return io.BytesIO(pages[url])

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return asked


def test_the_given_folder_comes_first(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = put(places / "given", RIGHT)
    named = put(places / "named", RIGHT)
    cached = put(cache_folder(), RIGHT)
    assert locate(source(), places / "given") == given
    monkeypatch.setenv("GSIL_BENCH_DATA", str(places / "named"))
    assert locate(source(), places / "given") == given
    assert locate(source()) == named
    assert locate(source(), places / "empty") == named
    monkeypatch.delenv("GSIL_BENCH_DATA")
    assert locate(source()) == cached


def test_a_wrong_file_of_the_user_is_an_error_and_not_passed_over(places: Path) -> None:
    wrong = put(places / "given", WRONG)
    put(cache_folder(), RIGHT)
    with pytest.raises(UserError) as caught:
        locate(source(), places / "given")
    message = str(caught.value)
    assert str(wrong) in message and hashlib.sha256(WRONG).hexdigest() in message and source().sha256 in message
    assert "\n" not in message


def test_missing_everywhere_says_where_it_was_looked_for_and_what_to_do(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GSIL_BENCH_DATA", str(places / "named"))
    with pytest.raises(UserError) as caught:
        locate(source("https://example.org/toy.txt"), places / "given")
    message = str(caught.value)
    for part in (
        "toy",
        str(places / "given/folder/toy.txt"),
        str(places / "named/folder/toy.txt"),
        str(cache_folder() / "folder/toy.txt"),
        "https://example.org/toy.txt",
        "no network in tests",
        "set GSIL_BENCH_DATA",
    ):
        assert part in message
    assert "\n" not in message


def test_download_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = serve(monkeypatch, {"https://example.org/toy.txt": RIGHT})
    path = locate(source("https://example.org/toy.txt"))
    assert path == cache_folder() / "folder/toy.txt"
    assert path.read_bytes() == RIGHT
    assert locate(source("https://example.org/toy.txt")) == path
    assert asked == ["https://example.org/toy.txt"]
    assert list(path.parent.iterdir()) == [path]


def test_second_address_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = serve(monkeypatch, {"https://a.org/x": WRONG, "https://b.org/x": RIGHT})
    assert locate(source("https://none.org/x", "https://a.org/x", "https://b.org/x")).read_bytes() == RIGHT
    assert asked == ["https://none.org/x", "https://a.org/x", "https://b.org/x"]


def test_a_download_of_other_bytes_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, {"https://example.org/toy.txt": WRONG})
    with pytest.raises(UserError, match="gave another file"):
        locate(source("https://example.org/toy.txt"))
    assert list((cache_folder() / "folder").iterdir()) == []


def test_a_damaged_file_in_the_cache_is_downloaded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    put(cache_folder(), WRONG)
    serve(monkeypatch, {"https://example.org/toy.txt": RIGHT})
    assert locate(source("https://example.org/toy.txt")).read_bytes() == RIGHT


def test_file_addresses_work_with_the_true_opener(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(places / "cache"))
    monkeypatch.delenv("GSIL_BENCH_DATA", raising=False)
    (places / "remote.txt").write_bytes(RIGHT)
    assert locate(source((places / "remote.txt").as_uri())).read_bytes() == RIGHT


def test_a_cache_that_cannot_be_written_is_one_line(places: Path) -> None:
    (places / "cache").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="could not be downloaded") as caught:
        locate(source("https://example.org/toy.txt"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("url", ["", "no address at all", "https://"])
def test_a_malformed_address_is_one_line(url: str, monkeypatch: pytest.MonkeyPatch, places: Path) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(places / "cache"))
    with pytest.raises(UserError, match="is missing"):
        locate(source(url), places)


def test_no_address_is_an_error_too() -> None:
    with pytest.raises(UserError, match="no public address"):
        locate(source())


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, places: Path) -> None:
    assert cache_folder() == places / "cache/gsil_bench"
    monkeypatch.setenv("HOME", str(places / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert cache_folder() == places / "home/.cache/gsil_bench"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == places / "home/.cache/gsil_bench"


def test_registered_sources_are_well_formed() -> None:
    assert {"gsm8k-test", "gsm8k-train", "humaneval-test"} <= set(SOURCES)
    for name, entry in SOURCES.items():
        assert entry.name == name
        assert len(bytes.fromhex(entry.sha256)) == 32
        assert entry.urls and all(url.startswith("https://") for url in entry.urls)
        assert entry.licence
        assert not Path(entry.path).is_absolute() and ".." not in Path(entry.path).parts


def test_module_has_one_list_of_sources() -> None:
    constants = [value for value in vars(sources).values() if isinstance(value, Source)]
    assert sorted(entry.name for entry in constants) == sorted(SOURCES)
