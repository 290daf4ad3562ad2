"""The command, from bad input to a killed run, on an untrained model that needs seconds."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import typer
import yaml

from gsil_bench import compare
from gsil_bench.config import resolve
from gsil_bench.execution import local

ROOT = Path(__file__).parent.parent
SETTINGS = ["gsil-logistic.max_new_tokens=8", "gsil-logistic.learning_rate=1e-3", "sft.learning_rate=1e-3"]


@pytest.fixture
def command(tiny_model: Path, demonstrations_file: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """The arguments of a small comparison, with changes; None drops an option."""

    def arguments(**changes: object) -> list[str]:
        options: dict[str, object] = {
            "model": tiny_model,
            "demonstrations": demonstrations_file,
            "tasks": "support:TASK",
            "methods": "sft,gsil-logistic",
            "out": tmp_path / "out",
        } | changes
        compared = str(options["methods"]).split(",")
        if "set" not in changes:
            options["set"] = [item for item in SETTINGS if item.partition(".")[0] in compared]
        words: list[str] = []
        for name, value in options.items():
            for item in value if isinstance(value, list) else [value]:
                flag = f"--{name.replace('_', '-')}"
                words += [] if item is None else [flag] if item is True else [flag, str(item)]
        return words

    return arguments


def call(words: Sequence[str]) -> int:
    """Run the command in this process; its exit code."""
    app = typer.Typer()
    app.command()(compare.compare)
    return compare.call(app, words)


def call_quietly(words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = call(words)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Labels of the stages that did work, over all calls in the test."""
    labels: list[str] = []
    build = local.LocalRun._build

    def watched(self: local.LocalRun, stage: local.Stage) -> object:
        made = build(self, stage)
        labels.append(stage.label)
        return made

    monkeypatch.setattr(local.LocalRun, "_build", watched)
    return labels


def results(out: Path) -> dict[str, object]:
    """Every result, without what two runs of one configuration may differ in."""
    found = {}
    for path in sorted((out / "results").rglob("*.json")):
        data = json.loads(path.read_text())
        trained = [data["provenance"]["rounds"], data["provenance"]["scores"]]
        data["cost"].pop("seconds")
        data.pop("provenance")
        found[path.relative_to(out).as_posix()] = [data, trained]
    return found


def test_a_comparison_ends_in_a_table_and_files(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call_quietly(command(), capsys)
    assert code == 0
    for row in ("start (no training)", "sft", "gsil-logistic"):
        assert row in out
    assert "training-seed variance was not measured" in " ".join(out.split())
    assert "estimate: about" in err
    assert "step 0: |log-ratio|" in err
    rows = list(csv.DictReader((tmp_path / "out" / "table.csv").read_text().splitlines()))
    assert [(row["method"], row["task"]) for row in rows] == [
        (method, task) for task in ("letters", "held-out-nll") for method in ("start", "sft", "gsil-logistic")
    ]
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert config["methods"] == ["sft", "gsil-logistic"]
    result = json.loads((tmp_path / "out" / "results" / "letters" / "sft-seed0.json").read_text())
    assert result["provenance"]["configuration"] == config
    assert result["provenance"]["inputs"]["demonstrations"]["trained on"] == 36
    assert len(result["items"]) == 12
    assert result["cost"]["steps"] == 3


def test_a_finished_comparison_does_no_work_and_keeps_its_files(
    command: Callable[..., list[str]], tmp_path: Path, executed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(command()) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.json")}
    executed.clear()
    assert call(command()) == 0
    assert executed == []
    assert "nothing to do: every stage was there" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.json")} == before


def test_another_method_costs_only_its_own_stages(command: Callable[..., list[str]], executed: list[str]) -> None:
    assert call(command()) == 0
    executed.clear()
    changes = [*SETTINGS, "gsil-brier.max_new_tokens=8"]
    assert call(command(methods="sft,gsil-logistic,gsil-brier", set=changes)) == 0
    assert "train gsil-brier, seed 0" in executed
    assert all("gsil-brier" in label for label in executed)


def test_methods_share_generations_and_reference(command: Callable[..., list[str]], executed: list[str]) -> None:
    assert call(command(methods="gsil-logistic,gsil-brier,gsil-kliep,dpo", set=None)) == 0
    assert sum(label.startswith("self-generate") for label in executed) == 1
    assert sum(label.startswith("reference") for label in executed) == 2
    assert sum(label.startswith("train") for label in executed) == 4


def test_rounds_play_against_the_policy_of_the_round_before(command: Callable[..., list[str]], executed: list[str]) -> None:
    assert call(command(methods="spin", set=["spin.max_new_tokens=8", "spin.mix_rounds=2"])) == 0
    assert [label for label in executed if "self-generate" in label or label.startswith("train")] == [
        "self-generate from the start, seed 0",
        "train spin, seed 0, round 1",
        "self-generate from spin, seed 0, round 1, seed 0",
        "train spin, seed 0, round 2",
    ]
    # round 2 mixes both rounds' data, both under the new opponent
    assert sum(label.startswith("reference log-probs of generated") for label in executed) == 3


def test_seeds_samples_and_turns(command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call_quietly(
        command(seeds="0,1,2", tasks="support:SAMPLED,support:TWO_TURNS", methods="sft,sft-continued"), capsys
    )
    assert code == 0
    assert "letters-sampled" in out
    names = sorted(path.name for path in (tmp_path / "out" / "results" / "letters-twice").iterdir())
    assert names == sorted(["start-seed0.json", *(f"{m}-seed{s}.json" for m in ("sft", "sft-continued") for s in (0, 1, 2))])


def test_one_method_that_fails_does_not_take_the_others(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call_quietly(command(methods="sft,support:RAISES,gsil-logistic"), capsys)
    assert code == 1
    assert "this loss always fails" in out
    assert "FAILED train raises, seed 0: RuntimeError: this loss always fails" in err
    finished = sorted(path.name for path in (tmp_path / "out" / "results" / "letters").iterdir())
    assert finished == ["gsil-logistic-seed0.json", "sft-seed0.json", "start-seed0.json"]
    traceback = next((tmp_path / "out" / "failures").iterdir()).read_text()
    assert "in _raises" in traceback


def test_dry_run_writes_nothing(command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call_quietly(command(dry_run=True), capsys)
    assert code == 0
    assert "train gsil-logistic, seed 0" in out
    assert not (tmp_path / "out").exists()
    code, out, _ = call_quietly(command(dry_run=True, json=True), capsys)
    assert json.loads(out)["control"] == "sft"


def test_json_on_standard_output_is_json(command: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call_quietly(command(json=True, methods="sft"), capsys)
    assert code == 0
    assert json.loads(out)


def test_a_recipe_says_the_same_as_flags(command: Callable[..., list[str]], tmp_path: Path, executed: list[str]) -> None:
    assert call(command()) == 0
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((tmp_path / "out" / "config.yaml").read_text())
    executed.clear()
    assert call(["--recipe", str(recipe)]) == 0
    assert executed == []


def test_dpo_takes_preference_data_and_says_so(
    command: Callable[..., list[str]], tmp_path: Path, executed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": f"No idea about {n}."} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, _ = call_quietly(command(methods="dpo,gsil-logistic", demonstrations=path), capsys)
    assert code == 0
    assert "dpo: trained on the rejected answers of the preference data" in " ".join(out.split())
    assert "reference log-probs of rejected answers under the start" in executed
    assert sum(label.startswith("self-generate") for label in executed) == 1  # gsil-logistic's
    # Every log-ratio is 0 at the first step: dpo's loss is ln 2, that of gsil-logistic 2 ln 2.
    steps = [json.loads(path.read_text().splitlines()[0]) for path in tmp_path.rglob("metrics.jsonl")]
    dpo, gsil = sorted(steps, key=lambda step: float(step["loss"]))
    assert [dpo["loss"], gsil["loss"]] == pytest.approx([0.693147, 1.386294], abs=1e-3)
    assert abs(dpo["generated_logps"] - dpo["real_logps"]) > 0.5  # other answers than the chosen ones


def test_partial_preferences_are_not_used_in_silence(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": f"No {n}."} for n in range(20)]
    rows += [{"prompt": f"What is {n}?", "completion": f"It is {n}."} for n in range(20, 40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, _ = call_quietly(command(methods="dpo", demonstrations=path, dry_run=True), capsys)
    assert code == 0
    assert "dpo: trained on demonstrations against samples of the initial policy (only" in out


def test_greedy_self_generations_are_shared_by_all_seeds(command: Callable[..., list[str]], executed: list[str]) -> None:
    settings = ["gsil-logistic.temperature=0", "gsil-logistic.max_new_tokens=4"]
    assert call(command(methods="gsil-logistic", seeds="0,1", set=settings)) == 0
    assert [label for label in executed if label.startswith("self-generate")] == ["self-generate from the start, greedy"]


def test_budgets_that_differ_are_refused(command: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call_quietly(command(set=[*SETTINGS, "sft.epochs=4"]), capsys)
    assert code == 0
    assert "refused" in out
    # 36 demonstrations in batches of 32: 3 steps for 2 epochs, 5 for 4
    assert "budget" in out
    assert "5 steps of" in " ".join(out.split())


def test_rounds_that_outnumber_the_steps_change_the_budget(
    command: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Five rounds take a step each at least, although a tenth of an epoch is one step."""
    settings = ["sft.epochs=0.1", "spin.epochs=0.1", "spin.rounds=5", "spin.max_new_tokens=4"]
    _, out, _ = call_quietly(command(methods="sft,spin", set=settings), capsys)
    assert "refused" in out


def test_the_control_says_when_its_tokens_do_not_match(
    command: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["gsil-logistic.max_new_tokens=2", "sft-continued.max_new_tokens=60"]
    _, out, _ = call_quietly(command(methods="sft-continued,gsil-logistic", set=settings), capsys)
    assert "times the tokens of sft-continued" in " ".join(out.split())


def test_a_limit_takes_the_first_demonstrations_of_every_task(
    command: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    from gsil_bench.inputs import read_inputs
    from gsil_bench.tasks import load_task

    names = ["mini-gsm8k", "mini-humaneval", "mini-mt-bench"]
    tasks = ",".join(names)
    words = command(demonstrations=None, tasks=tasks, limit=4, limit_demonstrations=30, dry_run=True, json=True)
    _, out, _ = call_quietly(words, capsys)
    assert json.loads(out)["inputs"]["demonstrations"]["rows"] == 30
    config = resolve({"model": "mini", "tasks": tasks, "limit_demonstrations": "30"}, None, compare.RECIPES)
    data = read_inputs(config).demonstrations
    taken = [item.where for item in (*data.train, *data.held_out)]
    ids = [{item.id for item in load_task(name).items("train", None)} for name in names]
    assert [sum(where in known for where in taken) for known in ids] == [10, 10, 10]


def test_an_edited_loss_is_trained_again(
    command: Callable[..., list[str]], tmp_path: Path, executed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss's own module, and a module of the user's that it imports."""
    import importlib

    (tmp_path / "edited_helper.py").write_text("SCALE = 1.0\n")
    text = "from edited_helper import SCALE\nfrom gsil_bench.methods import Method\n\n\ndef loss(pair):\n"
    (tmp_path / "edited.py").write_text(
        text + "    return -SCALE * pair.policy_real_logps\n\n\nM = Method('edited', 's', loss)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert call(command(methods="edited:M")) == 0
    executed.clear()
    assert call(command(methods="edited:M")) == 0
    assert executed == []
    (tmp_path / "edited_helper.py").write_text("SCALE = 1.01\n")
    for name in ("edited_helper", "edited"):
        importlib.invalidate_caches()
        monkeypatch.delitem(sys.modules, name)
    assert call(command(methods="edited:M")) == 0
    assert "train edited, seed 0" in executed


def test_many_rounds_are_planned_at_once(command: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call_quietly(command(methods="spin", set=["spin.rounds=40"], dry_run=True), capsys)
    assert code == 0
    assert out.count("train spin, seed 0, round") == 40


def test_a_scorer_that_cannot_be_trusted_is_found_before_training(
    command: Callable[..., list[str]], executed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call_quietly(command(tasks="support:TASK,support:BLIND", methods="sft"), capsys)
    assert code == 1
    assert "the empty answer of item test-0 scores 1.0" in " ".join(out.split())
    assert err.index("FAILED canaries of blind") < err.index("train sft")
    assert "score letters of sft, seed 0" in executed


def test_a_failed_cell_leaves_no_result_of_another_configuration(command: Callable[..., list[str]], tmp_path: Path) -> None:
    path = tmp_path / "out" / "results" / "letters" / "sft-seed0.json"
    assert call(command(methods="sft")) == 0
    assert path.exists()
    assert call(command(methods="sft", set=["sft.learning_rate=1e14"])) == 1
    assert not path.exists()


def test_damaged_artefacts_are_made_again(command: Callable[..., list[str]], tmp_path: Path, executed: list[str]) -> None:
    assert call(command()) == 0
    before = results(tmp_path / "out")
    weights = next((tmp_path / "out" / "store" / "training").rglob("model.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    next((tmp_path / "out" / "store" / "answers").rglob("manifest.json")).write_text("[]")
    executed.clear()
    assert call(command()) == 0
    assert any(label.startswith("train") for label in executed)
    assert any(label.startswith("answer") for label in executed)
    assert results(tmp_path / "out") == before


def test_a_terminal_without_unicode_does_not_lose_the_table(command: Callable[..., list[str]]) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run(
        [sys.executable, "-m", "gsil_bench.compare", *command(methods="sft")], capture_output=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert b"held-out-nll" in done.stdout


# ---- interruptions ----------------------------------------------------------------------------------------------------


def start_process(words: Sequence[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    return subprocess.Popen(
        [sys.executable, "-m", "gsil_bench.compare", *words],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("marker", ["] held-out loss of the start", "] self-generate", "] train sft"])
def test_a_killed_run_continues_to_the_same_results(
    command: Callable[..., list[str]], tmp_path: Path, number: signal.Signals, marker: str
) -> None:
    """Kill when a line of progress has come, that is in the middle of the next stage; what follows must not tell."""
    settings = ["sft.epochs=6", "gsil-logistic.epochs=6", "gsil-logistic.max_new_tokens=8"]
    whole = start_process(command(out=tmp_path / "whole", set=settings))
    assert whole.communicate(timeout=300) and whole.returncode == 0
    process = start_process(command(out=tmp_path / "killed", set=settings))
    assert process.stderr is not None
    for line in process.stderr:
        if marker in line:
            time.sleep(0.1)
            process.send_signal(number)
            break
    else:
        pytest.fail(f"no line with {marker!r}")
    process.communicate(timeout=120)
    assert process.returncode == (130 if number == signal.SIGINT else -9)
    again = start_process(command(out=tmp_path / "killed", set=settings))
    _, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    assert results(tmp_path / "killed") == results(tmp_path / "whole")
    assert marker not in err  # that stage was not done again


def test_threads_of_two_processes_wait_for_each_other(command: Callable[..., list[str]], tmp_path: Path) -> None:
    processes = [start_process(command(methods="sft")) for _ in range(2)]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sum(error.count("] train sft, seed 0") for error in errors) <= 2
    assert len(results(tmp_path / "out")) == 4


# ---- bad input --------------------------------------------------------------------------------------------------------


def line_of(words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of an error, after checking that it is one, that the code is 2 and that nothing was written."""
    code, out, err = call_quietly(words, capsys)
    lines = [line for line in err.splitlines() if line.strip()]
    assert code == 2, err
    assert out == ""
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


BAD = {
    "unknown method": ({"methods": "sft,gsil-logistc"}, "unknown method 'gsil-logistc': did you mean 'gsil-logistic'?"),
    "unknown task": ({"tasks": "mini-gsm"}, "unknown task 'mini-gsm': did you mean 'mini-gsm8k'?"),
    "unknown setting": ({"set": "gsil-logistic.scal=2"}, "unknown setting of gsil-logistic 'scal': did you mean 'scale'?"),
    "setting's value": ({"set": "gsil-logistic.scale=much"}, "gsil-logistic.scale=much: expected a number"),
    "setting out of range": ({"set": "sft.epochs=0"}, "sft.epochs=0.0 is out of range"),
    "setting of a method not compared": ({"set": "spin.beta=0.1"}, "unknown method in --set (not among --methods) 'spin'"),
    "malformed setting": ({"set": "scale"}, "expected METHOD.SETTING=VALUE"),
    "missing file": ({"demonstrations": "nowhere.jsonl"}, "nowhere.jsonl"),
    "no such model": ({"model": "nowhere/else/model"}, "no such folder"),
    "unknown control": ({"control": "sftt"}, "unknown control 'sftt': did you mean 'sft'?"),
    "method is no method": ({"methods": "support:NOT_A_METHOD"}, "is a int, not a gsil_bench.methods.Method"),
    "method's module": ({"methods": "no_such_module:X"}, "cannot be loaded"),
    "method's name is a path": ({"methods": "support:BAD_NAME"}, "letters, digits"),
    "loss that is a closure": ({"methods": "support:CLOSURE"}, "must be a function defined at the top of a module"),
    "loss that is a lambda": ({"methods": "support:LAMBDA"}, "must be a function defined at the top of a module"),
    "setting that the loss does not take": ({"methods": "support:WRONG_SETTING"}, "its settings do not fit its loss"),
    "setting named like a field": ({"methods": "support:TAKEN_SETTING"}, "has the name of a field"),
    "need that there is not": ({"methods": "support:MISSPELT"}, "'refrence': did you mean 'reference'?"),
    "batches that there are not": ({"methods": "support:ODD_BATCHES"}, "unknown value in batches"),
    "no rejected answers": ({"methods": "support:PREFERS"}, "needs preference data: 36 of 36 demonstrations have no"),
    "task of a taken name": ({"tasks": "support:TASK_OF_A_TAKEN_NAME"}, "the name of the column of the held-out loss"),
    "field without file": ({"demonstrations": None, "tasks": "mini-gsm8k", "field": "prompt=q"}, "--field: names the fields"),
    "empty out": ({"out": ""}, "--out: is empty"),
    "opponent": ({"methods": "spin", "set": "spin.opponent=nobody"}, "must be initial or previous"),
    "code without consent": ({"tasks": "support:WANTS_CODE"}, "--allow-code-execution"),
    "limit": ({"limit": "none"}, "--limit: expected a whole number of at least 1"),
    "seeds": ({"seeds": "a"}, "--seeds: expected int values"),
    "data dir": ({"data_dir": "nowhere"}, "--data-dir nowhere: no such folder"),
    "device": ({"device": "cpuu"}, "did you mean 'cpu'?"),
    "split": ({"split": "tst"}, "unknown split 'tst': did you mean 'test'?"),
    "unknown flag": ({"method": "sft"}, "No such option: --method"),
    "recipe": ({"recipe": "nowhere.yaml"}, "nowhere.yaml"),
    "chat template": ({"chat_template": "plan"}, "did you mean 'plain'?"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_code_2(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    changes, wanted = BAD[name]
    line = line_of(command(**changes), capsys)
    assert wanted in line
    assert not (tmp_path / "out").exists()


FILES = {
    "malformed line": ('{"prompt": "a", "completion": "b"}\n{"prompt": "a", \n', "mine.jsonl:2"),
    "missing field": ('{"prompt": "a", "completion": "b"}\n\n{"prompt": "a"}\n', "mine.jsonl:3"),
    "wrong type": ('{"prompt": "a", "completion": 3}\n', "mine.jsonl:1"),
    "empty file": ("", "no demonstrations"),
    "only empty answers": ('{"prompt": "a", "completion": "  "}\n', "no demonstrations"),
    "too long": (json.dumps({"prompt": "a", "completion": "word " * 400}) + "\n", "context of 256"),
    "forged end": ('{"prompt": "a", "completion": "b<|end|>c"}\n', "<|end|>"),
}


@pytest.mark.parametrize("name", FILES)
def test_bad_demonstrations_are_named(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    text, wanted = FILES[name]
    path = tmp_path / "mine.jsonl"
    path.write_text(text)
    assert wanted in line_of(command(demonstrations=path), capsys)
    assert not (tmp_path / "out").exists()


def test_nothing_left_after_dropping(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completion": "word " * 400}) + "\n")
    assert "None are left" in line_of(command(demonstrations=path, drop_long=True), capsys)


def test_tokenizer_without_template_says_how_to_give_one(
    command: Callable[..., list[str]], data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = line_of(command(model=data_dir / "models" / "stories260K"), capsys)
    assert "--chat-template" in line


def test_unwritable_output(command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    locked = Path("/proc/nowhere")  # not even root can write there
    if not locked.parent.is_dir():
        locked = tmp_path / "locked" / "out"
        locked.parent.mkdir(mode=0o500)
    assert "cannot write in" in line_of(command(out=locked), capsys)


def test_output_that_is_a_file(command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert "is not a folder" in line_of(command(out=tmp_path / "file"), capsys)


def test_resolve_is_what_the_command_uses(tiny_model: Path) -> None:
    assert resolve({"model": str(tiny_model)}, None, compare.RECIPES).model == str(tiny_model)


# Methods that go on from another one, and those that sample from the policy in training.

ON_POLICY = ["airl-reverse-kl.max_new_tokens=8", "airl-reverse-kl.samples=2", "airl-reverse-kl.learning_rate=1e-3"]


def budgets(out: Path) -> dict[str, str]:
    found = [json.loads(path.read_text()) for path in (out / "results" / "letters").glob("*.json")]
    return {result["method"]: result["comparable"]["budget"] for result in found}


def test_a_method_that_goes_on_from_another_has_the_same_budget(
    command: Callable[..., list[str]], tmp_path: Path, executed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """36 demonstrations, batches of 32, 3 epochs: ⌈3.4⌉ = 4 steps; of the other one, ⌈1.7⌉ = 2 are sft and 2 its own."""
    changes = [*SETTINGS[2:], *ON_POLICY, "sft.epochs=3", "airl-reverse-kl.epochs=3"]
    words = command(methods="sft,airl-reverse-kl", set=changes)
    code, printed, _ = call_quietly(words, capsys)
    assert code == 0
    assert len(set(budgets(tmp_path / "out").values()) - {None}) == 1
    trained = [label for label in executed if label.startswith("train")]
    assert trained == ["train sft, seed 0", "train sft, seed 0", "train airl-reverse-kl, seed 0"]
    assert "differ in" not in printed
    result = json.loads((tmp_path / "out" / "results" / "letters" / "airl-reverse-kl-seed0.json").read_text())
    whole = json.loads((tmp_path / "out" / "results" / "letters" / "sft-seed0.json").read_text())
    assert result["cost"]["steps"] == whole["cost"]["steps"]
    executed.clear()
    assert call_quietly(command(methods="sft,airl-reverse-kl", set=[*changes, "airl-reverse-kl.kl=0.2"]), capsys)[0] == 0
    assert [label for label in executed if label.startswith("train")] == ["train airl-reverse-kl, seed 0"]


def test_any_method_can_go_on_from_another(command: Callable[..., list[str]], tmp_path: Path, executed: list[str]) -> None:
    """Its opponent is then the policy that it goes on from, not the model as given."""
    assert call(command(methods="gsil-logistic", set=[*SETTINGS[:2], "gsil-logistic.starts_from=sft"])) == 0
    assert "self-generate from sft, seed 0, seed 0" in executed
    assert "self-generate from the start, seed 0" not in executed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"set": ["gsil-logistic.starts_from=sftt"]}, "unknown method 'sftt'"),
        ({"set": ["gsil-logistic.starts_from=start"]}, "gsil-logistic.starts_from=start: start does not train"),
        (
            {"set": ["gsil-logistic.starts_from=airl-reverse-kl"]},
            "gsil-logistic.starts_from=airl-reverse-kl: airl-reverse-kl starts from sft itself",
        ),
        (
            {"set": ["gsil-logistic.starts_from=last-mile-rl"], "processes": 2},
            "gsil-logistic.starts_from=last-mile-rl: last-mile-rl starts from sft itself",
        ),
        (
            {"methods": "sft,airl-reverse-kl", "processes": 2},
            "--processes: airl-reverse-kl samples from the policy that it trains, in one process only; leave it out",
        ),
    ],
)
def test_starting_points_that_cannot_be(
    command: Callable[..., list[str]], capsys: pytest.CaptureFixture[str], changes: dict[str, object], message: str
) -> None:
    code, _, error = call_quietly(command(**changes), capsys)
    assert code == 2
    assert message in " ".join(error.split())


def test_a_reward_model_learns_from_every_contrast_and_is_counted(command: Callable[..., list[str]], tmp_path: Path) -> None:
    """36 prompts, 2 samples each on both sides: 72 contrasts; 2 epochs in batches of 32 are ⌈4.5⌉ = 5 steps. A setting of `sft`
    is taken although only the method that starts from it is compared.
    """
    changes = ["samples=2", "max_new_tokens=8", "critic_epochs=2", "learning_rate=1e-3"]
    settings = [*(f"afd-init-sft.{change}" for change in changes), "sft.learning_rate=1e-3"]
    assert call(command(methods="afd-init-sft", set=settings)) == 0
    out = tmp_path / "out"
    (manifest,) = (out / "store" / "reward-model").glob("*/manifest.json")
    assert json.loads(manifest.read_text())["facts"]["steps"] == 5
    cost = json.loads((out / "results" / "letters" / "afd-init-sft-seed0.json").read_text())["cost"]
    assert cost["critic_tokens"] > 0 and cost["sampled_tokens"] > 0 and cost["critic_seconds"] >= 0
