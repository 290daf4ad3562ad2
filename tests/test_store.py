"""Artefacts: made once, kept whole, continued after a kill, built again when damaged."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from gsil_bench.errors import UserError
from gsil_bench.store import Produced, Store


def writes(text: str, calls: list[Path]) -> object:
    def make(folder: Path) -> Produced:
        calls.append(folder)
        (folder / "file.txt").write_text(text)
        return Produced({"length": len(text)})

    return make


def test_made_once_and_found_again(tmp_path: Path) -> None:
    store, calls = Store(tmp_path), list[Path]()
    made = store.build("kind", "f1", {"a": 1}, writes("hello", calls))  # type: ignore[arg-type]
    again = store.build("kind", "f1", {"a": 1}, writes("other", calls))  # type: ignore[arg-type]
    assert len(calls) == 1
    assert made == again == store.lookup("kind", "f1")
    assert made.facts == {"length": 5}
    assert store.lookup("kind", "f2") is None


def test_equal_files_have_equal_content_and_others_not(tmp_path: Path) -> None:
    store = Store(tmp_path)
    contents = [store.build("kind", name, {}, writes(text, [])).content for name, text in (("1", "a"), ("2", "a"), ("3", "b"))]  # type: ignore[arg-type]
    assert contents[0] == contents[1] != contents[2]


def test_an_interrupted_build_finds_what_it_left(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def fails(folder: Path) -> Produced:
        (folder / "half").write_text("kept")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.build("kind", "f", {}, fails)
    assert store.lookup("kind", "f") is None

    def goes_on(folder: Path) -> Produced:
        return Produced({"half": (folder / "half").read_text()})

    assert store.build("kind", "f", {}, goes_on).facts == {"half": "kept"}
    assert list((tmp_path / "partial").iterdir()) == []


@pytest.mark.parametrize("damage", ["cut", "gone", "manifest"])
def test_a_damaged_artefact_is_built_again(tmp_path: Path, damage: str) -> None:
    store, calls = Store(tmp_path), list[Path]()
    made = store.build("kind", "f", {}, writes("hello", calls))  # type: ignore[arg-type]
    if damage == "cut":
        (made.folder / "file.txt").write_text("hell")
    elif damage == "gone":
        (made.folder / "file.txt").unlink()
    else:
        (made.folder / "manifest.json").write_text("{")
    assert store.lookup("kind", "f") is None
    assert store.build("kind", "f", {}, writes("hello", calls)).content == made.content  # type: ignore[arg-type]
    assert len(calls) == 2


def test_a_killed_process_releases_its_lock(tmp_path: Path) -> None:
    code = f"""
        import os, signal
        from pathlib import Path
        from gsil_bench.store import Store
        def make(folder):
            (folder / "half").write_text("x")
            os.kill(os.getpid(), signal.SIGKILL)
        Store(Path({str(tmp_path)!r})).build("kind", "f", {{}}, make)
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=60)
    assert killed.returncode == -9
    waited: list[int] = []
    made = Store(tmp_path).build(
        "kind", "f", {}, lambda folder: Produced({"half": (folder / "half").exists()}), lambda: waited.append(1)
    )
    assert made.facts == {"half": True}
    assert waited == []


def test_two_builders_make_it_once(tmp_path: Path) -> None:
    store, calls, waited = Store(tmp_path), list[Path](), list[int]()
    begun, go = threading.Event(), threading.Event()

    def slow(folder: Path) -> Produced:
        begun.set()
        go.wait(10)
        return writes("x", calls)(folder)  # type: ignore[operator, no-any-return]

    first = threading.Thread(target=lambda: store.build("kind", "f", {}, slow))
    first.start()
    begun.wait(10)
    second = threading.Thread(
        target=lambda: Store(tmp_path).build("kind", "f", {}, writes("x", calls), lambda: (waited.append(1), go.set()))  # type: ignore[arg-type, func-returns-value]
    )
    second.start()
    first.join(20)
    second.join(20)
    assert len(calls) == 1
    assert waited == [1]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another folder with --out"):
        Store(tmp_path / "file" / "store").build("kind", "f", {}, writes("x", []))  # type: ignore[arg-type]


def test_leftovers_of_a_kill_are_not_part_of_the_content(tmp_path: Path) -> None:
    clean = Store(tmp_path / "clean").build("kind", "f", {}, writes("x", []))  # type: ignore[arg-type]
    partial = tmp_path / "dirty" / "partial" / "kind-f"
    partial.mkdir(parents=True)
    for name in (".file.txt.99", "state.pt.new", "completions.ordered"):
        (partial / name).write_text("half")
    assert Store(tmp_path / "dirty").build("kind", "f", {}, writes("x", [])).content == clean.content  # type: ignore[arg-type]


def test_waiting_for_another_process_can_be_given_up(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def inner(folder: Path) -> Produced:
        def give_up() -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            Store(tmp_path).build("kind", "f", {}, writes("x", []), poll=give_up)  # type: ignore[arg-type]
        return Produced()

    store.build("kind", "f", {}, inner)


def test_a_kill_between_manifest_and_renaming_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, calls = Store(tmp_path), list[Path]()

    def killed(self: Store, *_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Store, "_publish", killed)
        with pytest.raises(KeyboardInterrupt):
            store.build("kind", "f", {}, writes("x", calls))  # type: ignore[arg-type]
    assert store.lookup("kind", "f") is None
    assert store.build("kind", "f", {}, writes("x", calls)).facts == {"length": 1}  # type: ignore[arg-type]
    assert len(calls) == 1


def test_temporary_files_are_no_part_of_the_artefact(tmp_path: Path) -> None:
    def make(folder: Path) -> Produced:
        (folder / "kept").write_text("k")
        (folder / "state").write_text("s")
        return Produced(temporary=("state",))

    folder = Store(tmp_path).build("kind", "f", {}, make).folder
    assert sorted(path.name for path in folder.iterdir()) == ["kept", "manifest.json"]
