"""What is kept of generation: under which key, after damage, by two processes, and after a kill."""

from __future__ import annotations

import dataclasses
import json
import logging
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Generator, Sequence
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gsil_bench import compare
from gsil_bench.config import resolve
from gsil_bench.errors import StoreError
from gsil_bench.generation.answer_store import AnswerStore
from gsil_bench.generation.engine import Completion, EngineError, Request, Sampling
from gsil_bench.generation.transformers_engine import TransformersEngine
from gsil_bench.inputs import read_inputs
from gsil_bench.models.checkpoint import load_model, weights_sha256
from gsil_bench.models.packing import TokenTree
from gsil_bench.records import canonical, digest
from gsil_bench.stages import Resources
from gsil_bench.store import Artefact

ROOT = Path(__file__).parent.parent
FRAME = {"weights": "aa", "engine": "fake/v1", "context_length": 256}
DRAWN = Sampling(8, 1.0, 0.9, seed=3)


class Fake:
    """Completes a prompt with its reverse, in a strange order, and counts what it was asked."""

    identity = "fake/v1"

    def __init__(self, errors: Sequence[tuple[int, ...]] = ()) -> None:
        self.asked: list[Request] = []
        self.errors = errors

    def complete(self, requests: Sequence[Request]) -> Generator[tuple[int, Completion], None, None]:
        for index in reversed(range(len(requests))):
            request = requests[index]
            self.asked.append(request)
            if request.prompt_ids in self.errors:
                yield index, Completion((), "", "error", "no room")
            else:
                tokens = (*request.prompt_ids[::-1], request.sample)
                yield index, Completion(tokens, f"«{tokens}»\n\u2028", "stop", "", (-0.5,) if request.logps else None)

    def logps(self, trees: Sequence[TokenTree]) -> list[list[tuple[float, ...]]]:
        raise NotImplementedError

    def close(self) -> None:
        pass


def ask(folder: Path, requests: Sequence[Request], frame: dict[str, object] | None = None) -> tuple[list[Completion], int]:
    """The completions of a store opened anew, and how many requests reached the engine."""
    fake = Fake()
    completions = AnswerStore(folder, frame or FRAME).complete(lambda: fake, requests)
    return completions, len(fake.asked)


def drawn(count: int) -> list[Request]:
    return [Request((number, number + 1), DRAWN) for number in range(count)]


def file_of(folder: Path) -> Path:
    (path,) = folder.glob("*.jsonl")
    return path


# ---- keys -------------------------------------------------------------------------------------------------------------


def test_what_was_answered_is_not_asked_again(tmp_path: Path) -> None:
    requests = [*drawn(3), Request((5,), DRAWN, sample=1, logps=True)]
    first, asked = ask(tmp_path, requests)
    assert asked == 4
    assert [completion.tokens for completion in first] == [(1, 0, 0), (2, 1, 0), (3, 2, 0), (5, 1)]
    again, asked = ask(tmp_path, [*requests[::-1], Request((9,), DRAWN)])
    assert asked == 1
    assert again[:4] == first[::-1]
    assert again[0].logps == (-0.5,)


def test_an_engine_is_not_made_if_nothing_is_missing(tmp_path: Path) -> None:
    ask(tmp_path, drawn(2))

    def never() -> Fake:
        pytest.fail("an engine was made")

    assert len(AnswerStore(tmp_path, FRAME).complete(never, drawn(2))) == 2


BASE = Request((1, 2), DRAWN)
OTHERS = {
    "prompt": dataclasses.replace(BASE, prompt_ids=(1, 3)),
    "order": dataclasses.replace(BASE, prompt_ids=(2, 1)),
    "sample": dataclasses.replace(BASE, sample=1),
    "log-probs": dataclasses.replace(BASE, logps=True),
    "seed": dataclasses.replace(BASE, sampling=dataclasses.replace(DRAWN, seed=4)),
    "temperature": dataclasses.replace(BASE, sampling=dataclasses.replace(DRAWN, temperature=0.9)),
    "top_p": dataclasses.replace(BASE, sampling=dataclasses.replace(DRAWN, top_p=0.8)),
    "length": dataclasses.replace(BASE, sampling=dataclasses.replace(DRAWN, max_new_tokens=9)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_request_is_asked(tmp_path: Path, name: str) -> None:
    ask(tmp_path, [BASE])
    assert ask(tmp_path, [OTHERS[name]])[1] == 1
    assert ask(tmp_path, [BASE, OTHERS[name]])[1] == 0


def test_a_greedy_answer_has_no_seed_nor_sample(tmp_path: Path) -> None:
    alike = [
        Request((1, 2), Sampling(8, 0.0, top_p, seed), sample) for top_p in (0.9, 1.0) for seed in (0, 7) for sample in (0, 1)
    ]
    progress: list[int] = []
    fake = Fake()
    completions = AnswerStore(tmp_path, FRAME).complete(lambda: fake, alike, progress.append)
    assert len(fake.asked) == 1
    assert len(set(completions)) == 1
    assert progress == [0, 8]  # eight requests became done with one completion
    assert ask(tmp_path, [Request((1, 2), Sampling(9))])[1] == 1


@pytest.mark.parametrize("change", [{"weights": "ab"}, {"engine": "fake/v2"}, {"context_length": 128}, {"more": 1}])
def test_another_frame_shares_nothing(tmp_path: Path, change: dict[str, object]) -> None:
    ask(tmp_path, drawn(2))
    assert ask(tmp_path, drawn(2), {**FRAME, **change})[1] == 2
    assert ask(tmp_path, drawn(2))[1] == 0


def test_a_store_that_was_moved_is_found(tmp_path: Path) -> None:
    first, _ = ask(tmp_path / "here", drawn(4))
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert ask(tmp_path / "there", drawn(4)) == (first, 0)


def test_errors_are_not_kept(tmp_path: Path) -> None:
    fake = Fake(errors=[(1, 2)])
    completions = AnswerStore(tmp_path, FRAME).complete(lambda: fake, drawn(3))
    assert [completion.error for completion in completions] == ["", "no room", ""]
    completions, asked = ask(tmp_path, drawn(3))
    assert asked == 1
    assert completions[1].tokens == (2, 1, 0)


def test_progress_adds_up_and_what_came_before_a_stop_is_kept(tmp_path: Path) -> None:
    calls: list[int] = []

    def stop(done: int) -> None:
        calls.append(done)
        if len(calls) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        AnswerStore(tmp_path, FRAME).complete(Fake, drawn(10), stop)
    progress: list[int] = []
    fake = Fake()
    AnswerStore(tmp_path, FRAME).complete(lambda: fake, drawn(10), progress.append)
    assert len(fake.asked) == 7
    assert progress == [3, *[1] * 7]


# ---- damage -----------------------------------------------------------------------------------------------------------


def test_a_torn_line_is_cut_at_whatever_byte(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole, _ = ask(tmp_path, drawn(4))
    data = file_of(tmp_path).read_bytes()
    last = data[:-1].rfind(b"\n") + 1
    for end in (last + 1, last + 20, (last + len(data)) // 2, len(data) - 1):
        file_of(tmp_path).write_bytes(data[:end])
        assert ask(tmp_path, drawn(4)) == (whole, 1)
        assert file_of(tmp_path).read_bytes() == data
    assert "cannot be read" not in caplog.text  # what a kill does is no damage


def test_a_torn_first_line_is_written_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole, _ = ask(tmp_path, drawn(3))
    data = file_of(tmp_path).read_bytes()
    for end in (0, 1, 30):
        file_of(tmp_path).write_bytes(data[:end])
        assert ask(tmp_path, drawn(3)) == (whole, 3)
        assert ask(tmp_path, drawn(3)) == (whole, 0)
        assert json.loads(file_of(tmp_path).read_bytes().splitlines()[0]) == FRAME
    assert "cannot be read" not in caplog.text


@pytest.mark.parametrize("first", [b"", b"garbage\n", b'{"weights":"bb"}\n'], ids=["none", "garbage", "another"])
def test_a_wrong_first_line_is_put_right_and_costs_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, first: bytes
) -> None:
    whole, _ = ask(tmp_path, drawn(3))
    data = file_of(tmp_path).read_bytes()
    file_of(tmp_path).write_bytes(first + data.partition(b"\n")[2])
    assert ask(tmp_path, drawn(3)) == (whole, 0)
    assert file_of(tmp_path).read_bytes() == data
    assert ("1 lines cannot be read (1)" in caplog.text) == bool(first)


def test_damaged_lines_are_reported_once_and_kept_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole, _ = ask(tmp_path, drawn(3))
    with file_of(tmp_path).open("ab") as file:
        file.write(b"garbage\n")
    assert ask(tmp_path, drawn(3)) == (whole, 0)
    assert ask(tmp_path, drawn(3)) == (whole, 0)
    assert caplog.text.count("cannot be read") == 1
    assert file_of(tmp_path).with_suffix(".damaged").read_bytes() == b"garbage\n"


def test_what_a_server_did_not_serve_is_asked_again(tmp_path: Path) -> None:
    """The others are kept; an error that will not pass is an answer of its own."""

    class Busy(Fake):
        def complete(self, requests: Sequence[Request]) -> Generator[tuple[int, Completion], None, None]:
            for index, completion in super().complete(requests):
                yield index, Completion((), "", "error", "busy", passing=True) if index == 1 else completion

    store = AnswerStore(tmp_path, FRAME)
    with pytest.raises(EngineError, match=r"1 of 4 prompts were not served \(busy\); the others are kept"):
        store.complete(Busy, drawn(4))
    assert ask(tmp_path, drawn(4))[1] == 1


def checked(text: str) -> bytes:
    """A record with the checksum that it would have been written with."""
    return canonical({**json.loads(text), "check": digest(json.loads(text))[:16]}).encode()


DAMAGE = {
    "no JSON": b"\x00\xff garbage",
    "cut within": b'{"key": "',
    "empty": b"",
    "no object": b"[1, 2]",
    "a null": b"null",
    "no checksum": b'{"key":"k","tokens":[1],"text":"","finish_reason":"stop","error":"","logps":null}',
    "no key": checked('{"tokens":[1],"text":"","finish_reason":"stop","error":"","logps":null}'),
    "no tokens": checked('{"key":"k","text":"","finish_reason":"stop","error":"","logps":null}'),
    "tokens that are none": checked('{"key":"k","tokens":["a"],"text":"","finish_reason":"stop","error":"","logps":null}'),
    "an unknown field": checked('{"key":"k","tokens":[1],"text":"","finish_reason":"stop","error":"","logps":null,"x":1}'),
    "log-probs that are a number": checked('{"key":"k","tokens":[1],"text":"","finish_reason":"stop","error":"","logps":1}'),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_corrupt_line_is_named_and_made_again(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    whole, _ = ask(tmp_path, drawn(5))
    lines = file_of(tmp_path).read_bytes().splitlines()
    lines[3] = DAMAGE[name]
    file_of(tmp_path).write_bytes(b"\n".join(lines) + b"\n")
    with caplog.at_level(logging.WARNING):
        assert ask(tmp_path, drawn(5)) == (whole, 1)
    assert f"{file_of(tmp_path)}: 1 lines cannot be read (4)" in caplog.text
    assert ask(tmp_path, drawn(5)) == (whole, 0)


def test_a_changed_digit_is_no_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is a record as good as any other, but for its checksum."""
    whole, _ = ask(tmp_path, drawn(5))
    data = bytearray(file_of(tmp_path).read_bytes())
    data[data.rindex(b'"tokens":[') + len(b'"tokens":[')] ^= 1  # 1 becomes 0
    file_of(tmp_path).write_bytes(data)
    assert ask(tmp_path, drawn(5)) == (whole, 1)
    assert "1 lines cannot be read (6)" in caplog.text


def test_a_line_that_another_process_left_torn_spoils_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = AnswerStore(tmp_path, FRAME)
    with file_of(tmp_path).open("ab") as file:
        file.write(b'{"key": "torn')
    store.complete(Fake, drawn(3))
    assert ask(tmp_path, drawn(3))[1] == 0
    assert "1 lines cannot be read (2)" in caplog.text


def test_a_full_disk_is_an_error_of_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = AnswerStore(tmp_path, FRAME)

    def fail(record: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "_append", fail)
    with pytest.raises(StoreError, match="No space left on device; what came before is kept"):
        store.complete(Fake, drawn(3))


def test_many_corrupt_lines_are_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole, _ = ask(tmp_path, drawn(12))
    lines = file_of(tmp_path).read_bytes().splitlines()
    lines[2:10] = [b"?"] * 8
    file_of(tmp_path).write_bytes(b"\n".join(lines) + b"\n")
    assert ask(tmp_path, drawn(12)) == (whole, 8)
    assert caplog.text.count("8 lines cannot be read (3, 4, 5, 6, 7, …)") == 1


def test_a_duplicate_line_changes_nothing(tmp_path: Path) -> None:
    whole, _ = ask(tmp_path, drawn(3))
    lines = file_of(tmp_path).read_bytes().splitlines(keepends=True)
    file_of(tmp_path).write_bytes(b"".join([*lines, *lines[1:]]))
    assert ask(tmp_path, drawn(3)) == (whole, 0)


def test_a_folder_that_cannot_be_written_is_an_error_of_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="choose another folder with --out"):
        AnswerStore(tmp_path / "file" / "below", FRAME)


# ---- checkpoints ------------------------------------------------------------------------------------------------------


def test_answers_belong_to_weights_not_to_paths(
    tiny_model: Path, demonstrations_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    complete = TransformersEngine.complete

    def counted(self: TransformersEngine, requests: Sequence[Request]) -> Generator[tuple[int, Completion], None, None]:
        asked.append(len(requests))
        return complete(self, requests)

    monkeypatch.setattr(TransformersEngine, "complete", counted)

    def answers_of(folder: Path) -> list[Completion]:
        options = {"model": str(folder), "demonstrations": str(demonstrations_file), "tasks": "support:TASK", "methods": "sft"}
        inputs = read_inputs(resolve({**options, "out": str(tmp_path / "out")}, None, compare.RECIPES))
        resources = Resources(inputs)
        given = resources.complete(Artefact(folder, weights_sha256(folder)), [Request((5, number), DRAWN) for number in range(6)])
        resources.release()
        return given

    path, copy = tmp_path / "checkpoint", tmp_path / "elsewhere" / "renamed"
    shutil.copytree(tiny_model, path)
    first = answers_of(path)
    shutil.copytree(path, copy)
    assert answers_of(copy) == first
    assert asked == [6]  # a copy under another name costs nothing

    weights = path / "model.safetensors"
    tensors, before = load_file(weights), weights.read_bytes()
    save_file({name: -tensor for name, tensor in tensors.items()}, weights, {"format": "pt"})
    assert all(one != other for one, other in zip(answers_of(path), first, strict=True))
    assert asked == [6, 6]  # another model at the same path

    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] = torch.nextafter(tensors[name].view(-1)[0], torch.tensor(torch.inf))
    save_file(tensors, weights, {"format": "pt"})
    answers_of(path)
    assert asked == [6, 6, 6]  # one weight by its last bit

    weights.write_bytes(before)
    assert answers_of(path) == first
    assert asked == [6, 6, 6]


# ---- processes --------------------------------------------------------------------------------------------------------


def append_at_once(folder: Path, start: int, together: Barrier) -> None:
    together.wait()
    for number in range(start, start + 60, 3):  # the store is opened anew for each three
        AnswerStore(folder, FRAME).complete(Fake, drawn(number + 3)[number:])


def test_two_processes_lose_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Requests 0 to 59 and 30 to 89, at once, from the first line on."""
    context = multiprocessing.get_context("spawn")
    together = context.Barrier(2)
    processes = [context.Process(target=append_at_once, args=(tmp_path, start, together)) for start in (0, 30)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    completions, asked = ask(tmp_path, drawn(90))
    assert asked == 0
    assert [completion.tokens for completion in completions] == [(number + 1, number, 0) for number in range(90)]
    assert "cannot be read" not in caplog.text
    assert 91 <= file_of(tmp_path).read_bytes().count(b"\n") <= 121


KILLED = """
import sys, time
from pathlib import Path
import test_answer_store

def advance(done):
    print(done, flush=True)
    time.sleep(0.02)  # long enough to be killed within

test_answer_store.generate(Path(sys.argv[1]), Path(sys.argv[2]), advance)
"""
MANY = [Request(tuple(range(20, 21 + number % 7)), Sampling(4 + number % 9, 1.0), number) for number in range(40)]


def generate(folder: Path, out: Path, advance: object = lambda done: None) -> tuple[list[Completion], int]:
    """Complete MANY in few rows; also how many requests reached the engine."""
    model = load_model(folder)
    engine = TransformersEngine(model, [int(model.config.eos_token_id)], 256, lambda ids: str(list(ids)), memory_bytes=2**14)
    asked: list[int] = []
    complete = engine.complete

    def counted(requests: Sequence[Request]) -> Generator[tuple[int, Completion], None, None]:
        asked.append(len(requests))
        return complete(requests)

    engine.complete = counted  # type: ignore[method-assign]
    given = AnswerStore(out, {"weights": weights_sha256(folder)}).complete(lambda: engine, MANY, advance)  # type: ignore[arg-type]
    return given, sum(asked)


@pytest.mark.parametrize("after", [1, 2, 17])
def test_a_killed_process_loses_what_was_in_flight_only(tiny_model: Path, tmp_path: Path, after: int) -> None:
    """Killed when it has reported `after` completions: these at least are kept, and the rest is as if nothing had happened."""
    whole, _ = generate(tiny_model, tmp_path / "whole")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tiny_model), str(tmp_path / "killed")],
        stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    assert process.stdout is not None
    for _ in range(after + 1):  # the first line says that nothing was there
        process.stdout.readline()
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -9
    kept = file_of(tmp_path / "killed").read_bytes().count(b"\n") - 1
    assert after <= kept < len(MANY)
    assert generate(tiny_model, tmp_path / "killed") == (whole, len(MANY) - kept)
    lines = [sorted(file_of(tmp_path / name).read_bytes().splitlines()) for name in ("whole", "killed")]
    assert lines[0] == lines[1]
