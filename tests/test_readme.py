"""The README's example of a method from outside runs as it stands there, and its words about commands are true."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_method_runs_from_outside_the_repository(tmp_path: Path, tiny_model: Path, demonstrations_file: Path) -> None:
    example = re.search(r"`(my_lab/ipo\.py)`:\n\n```python\n(.*?)```", README, re.DOTALL)
    command = re.search(r"^    python -m gsil_bench\.compare (--methods sft,my_lab\.ipo:METHOD.*)$", README, re.MULTILINE)
    assert example is not None
    assert command is not None
    path = tmp_path / example.group(1)
    path.parent.mkdir()
    path.write_text(example.group(2), encoding="utf-8")
    words = [*command.group(1).split(), "--model", str(tiny_model), "--demonstrations", str(demonstrations_file)]
    words += ["--tasks", "support:TASK", "--set", "my_lab.ipo:METHOD.max_new_tokens=8"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run(
        [sys.executable, "-m", "gsil_bench.compare", *words],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(r"^my-ipo ", done.stdout, re.MULTILINE)
    assert "my-ipo: tau=0.2, 1 round against the initial policy (T=1)" in done.stderr


def test_every_file_of_the_tree_exists() -> None:
    tree = README.split("## Files")[1].split("```")[1]
    names = re.findall(r"^(  )?([\w/.]+\.py|[\w]+/)", tree, re.MULTILINE)
    for indent, name in names:
        assert (ROOT / ("gsil_bench" if indent else "") / name).exists(), name


def test_the_two_commands_are_those_that_ci_runs() -> None:
    assert re.search(r"^    pip install -c constraints\.txt -e \. && python -m gsil_bench\.compare ", README, re.MULTILINE)
    assert re.search(r"^    pip install -c constraints\.txt -e '\.\[test\]' && pytest$", README, re.MULTILINE)


def test_every_method_and_task_is_in_the_readme() -> None:
    from baselines import METHODS
    from gsil_bench.tasks import TASKS

    for name in [*METHODS, *TASKS]:
        stem = name.removeprefix("gsil")
        task, _, protocol = name.partition("/")
        row = next((line for line in README.splitlines() if line.startswith(f"| `{task}` |")), "")
        assert f"`{name}`" in README or f"`{stem}`" in README or f"`{protocol}`" in row, name
