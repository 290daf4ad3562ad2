"""The import rule: which place may not import which."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ("lm_eval", "vllm", "ray", "openai", "httpx2", "datasets", "pyarrow")
FORBIDDEN: dict[str, tuple[str, ...]] = {
    "gsil_bench/training": ("gsil_bench.evaluation", "baselines"),
    "gsil_bench/evaluation": ("gsil_bench.training", "baselines"),
    "gsil_bench/tasks": (
        "torch",
        "transformers",
        "gsil_bench.models",
        "gsil_bench.training",
        "gsil_bench.generation",
        "baselines",
    ),
    "gsil_bench/data/mini": ("torch", "transformers", "numpy", "baselines"),
    "gsil_bench": ("gsil_bench.compare",),
    "baselines": (
        "gsil_bench.training.loop",
        "gsil_bench.training.learner",
        "gsil_bench.evaluation",
        "gsil_bench.compare",
        "gsil_bench.plan",
        "baselines",
    ),
}
EXCEPTIONS = {("gsil_bench/cli.py", "gsil_bench.compare")}


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Full names of everything a file imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def is_below(name: str, place: str) -> bool:
    return name == place or name.startswith(place + ".")


def violations(place: str, forbidden: tuple[str, ...]) -> list[str]:
    found = []
    for path in sorted((ROOT / place).rglob("*.py")):
        relative = path.relative_to(ROOT).as_posix()
        for name in imports(path):
            for wall in forbidden:
                if is_below(name, wall) and (relative, wall) not in EXCEPTIONS:
                    found.append(f"{relative} imports {name}")
    return found


@pytest.mark.parametrize("place", FORBIDDEN)
def test_place_keeps_its_walls(place: str) -> None:
    assert violations(place, FORBIDDEN[place]) == []


def test_only_compare_imports_the_baselines() -> None:
    importers = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "gsil_bench").rglob("*.py")
        if any(is_below(name, "baselines") for name in imports(path))
    }
    assert importers == {"gsil_bench/compare.py"}


def test_heavy_packages_are_imported_only_where_they_are_used() -> None:
    for path in [*(ROOT / "gsil_bench").rglob("*.py"), *(ROOT / "baselines").rglob("*.py")]:
        heavy = [name for name in imports(path, top_level_only=True) for package in HEAVY if is_below(name, package)]
        assert heavy == [], path


def test_the_rule_sees_a_violation(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("from gsil_bench.training import loop\n")
    assert any(is_below(name, "gsil_bench.training") for name in imports(tmp_path / "bad.py"))


def test_one_optimizer_step() -> None:
    steps = [
        path.name for path in (ROOT / "gsil_bench").rglob("*.py") if "optimizer.step()\n" in path.read_text(encoding="utf-8")
    ]
    assert steps == ["learner.py"]


def test_nothing_asks_a_methods_name() -> None:
    """No file of the suite holds the name of a method; "start", the row of the untrained model, is a setting of the
    comparison.
    """
    from baselines import METHODS

    for path in (ROOT / "gsil_bench").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        compared = [
            constant.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Compare)
            for constant in ast.walk(node)
            if isinstance(constant, ast.Constant) and isinstance(constant.value, str)
        ]
        assert [name for name in compared if name in METHODS] == [], path


def test_importing_the_package_does_not_import_torch() -> None:
    import subprocess
    import sys

    code = "import gsil_bench, gsil_bench.tasks, gsil_bench.config, gsil_bench.compare, sys; print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert answer.stdout.strip() == "False"
