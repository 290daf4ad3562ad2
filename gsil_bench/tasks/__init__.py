"""TASKS: the name of every task and where it lives; SUITES: names that stand for several tasks."""

from __future__ import annotations

import importlib

from gsil_bench.errors import UserError, unknown_name
from gsil_bench.tasks.task import Task

TASKS: dict[str, str] = {
    "mini-gsm8k": "gsil_bench.tasks.mini:GSM8K",
    "mini-gsm8k-sampled": "gsil_bench.tasks.mini:GSM8K_SAMPLED",
    "mini-humaneval": "gsil_bench.tasks.mini:HUMANEVAL",
    "mini-mt-bench": "gsil_bench.tasks.mini:MT_BENCH",
    "gsm8k": "gsil_bench.tasks.gsm8k:GSM8K",
}

SUITES: dict[str, tuple[str, ...]] = {
    "mini": ("mini-gsm8k", "mini-gsm8k-sampled", "mini-humaneval", "mini-mt-bench"),
}


def load_task(name: str) -> Task:
    """The task of that name, or the one at "module:ATTRIBUTE".

    Raises:
        UserError: the name is unknown (the nearest one is offered), or the attribute is not a task.
    """
    target = TASKS.get(name, name)
    if ":" not in target:
        raise unknown_name("task", name, [*TASKS, *SUITES])
    module, _, attribute = target.partition(":")
    try:
        task = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # a user's module may raise anything while it is imported
        raise UserError(f"task {name!r} cannot be loaded: {type(error).__name__}: {error}") from error
    if not isinstance(task, Task):
        raise UserError(f"task {name!r}: {target} is not a Task (see gsil_bench/tasks/task.py)")
    return task


def expand(names: list[str]) -> list[str]:
    """Task names with every suite replaced by its tasks, order kept, repeats dropped."""
    return list(dict.fromkeys(task for name in names for task in SUITES.get(name, (name,))))
