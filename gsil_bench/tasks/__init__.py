"""TASKS: the name of every task and where it lives; ALIASES: the protocol that a task's bare name stands for; SUITES: names that
stand for several tasks.

A name is TASK or TASK/PROTOCOL. "lm-eval:NAME" is a task of lm-eval under its own definition, "lm-eval-chat:NAME" the same in the
model's chat template. "summarization:FILE" and "summarization/PROTOCOL:FILE" are made of a file of documents and summaries.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from gsil_bench.errors import UserError, unknown_name
from gsil_bench.tasks.task import Task

TASKS: dict[str, str] = {
    "mini-gsm8k": "gsil_bench.tasks.mini:GSM8K",
    "mini-gsm8k-sampled": "gsil_bench.tasks.mini:GSM8K_SAMPLED",
    "mini-humaneval": "gsil_bench.tasks.mini:HUMANEVAL",
    "mini-mt-bench": "gsil_bench.tasks.mini:MT_BENCH",
    "mini-summarization/raw": "gsil_bench.tasks.mini:SUMMARIZATION",
    "mini-summarization/post-processed": "gsil_bench.tasks.mini:SUMMARIZATION_POST_PROCESSED",
    "mini-summarization/greedy": "gsil_bench.tasks.mini:SUMMARIZATION_GREEDY",
    "gsm8k/lm-eval-v3": "gsil_bench.tasks.gsm8k:LM_EVAL_V3",
    "gsm8k/lm-eval-v1": "gsil_bench.tasks.gsm8k:LM_EVAL_V1",
    "gsm8k/openllm-v1": "gsil_bench.tasks.gsm8k:OPENLLM_V1",
    "gsm8k/chat-0shot-v1": "gsil_bench.tasks.gsm8k:CHAT_0SHOT",
    "humaneval/lm-eval-base": "gsil_bench.tasks.humaneval:LM_EVAL_BASE",
    "humaneval/lm-eval-instruct-v4": "gsil_bench.tasks.humaneval:LM_EVAL_INSTRUCT",
    "humaneval/eurus": "gsil_bench.tasks.humaneval:EURUS_SCRIPT",
    "humaneval/human-eval": "gsil_bench.tasks.humaneval:HUMAN_EVAL",
    "humaneval/chat-v1": "gsil_bench.tasks.humaneval:CHAT_V1",
    "humaneval/chat-v1-sampled": "gsil_bench.tasks.humaneval:CHAT_V1_SAMPLED",
    "mbpp/lm-eval-v1": "gsil_bench.tasks.mbpp:LM_EVAL_V1",
    "mbpp/chat-v1": "gsil_bench.tasks.mbpp:CHAT_V1",
    "mbpp/sanitized-chat-v1": "gsil_bench.tasks.mbpp:SANITIZED_CHAT_V1",
    "mt-bench/fastchat-single": "gsil_bench.tasks.mt_bench:FASTCHAT_SINGLE",
    "mt-bench/fastchat-single-corrected": "gsil_bench.tasks.mt_bench:FASTCHAT_SINGLE_CORRECTED",
    "openllm-v1/arc": "gsil_bench.tasks.lm_eval:OPENLLM_ARC",
    "openllm-v1/hellaswag": "gsil_bench.tasks.lm_eval:OPENLLM_HELLASWAG",
    "openllm-v1/mmlu": "gsil_bench.tasks.lm_eval:OPENLLM_MMLU",
    "openllm-v1/truthfulqa-mc2": "gsil_bench.tasks.lm_eval:OPENLLM_TRUTHFULQA",
    "openllm-v1/winogrande": "gsil_bench.tasks.lm_eval:OPENLLM_WINOGRANDE",
    "openllm-v1/gsm8k": "gsil_bench.tasks.lm_eval:OPENLLM_GSM8K",
    "summarization/rouge": "gsil_bench.tasks.summarization:ROUGE",
    "summarization/rouge-first-stop": "gsil_bench.tasks.summarization:ROUGE_FIRST_STOP",
    "summarization/rouge-no-repeats": "gsil_bench.tasks.summarization:ROUGE_NO_REPEATS",
    "summarization/rouge-finished": "gsil_bench.tasks.summarization:ROUGE_FINISHED",
    "summarization/rouge-post-processed": "gsil_bench.tasks.summarization:ROUGE_POST_PROCESSED",
}

ALIASES: dict[str, str] = {
    "mini-summarization": "mini-summarization/raw",
    "gsm8k": "gsm8k/lm-eval-v3",
    "humaneval": "humaneval/lm-eval-instruct-v4",
    "mbpp": "mbpp/chat-v1",
    "mt-bench": "mt-bench/fastchat-single",
    "summarization": "summarization/rouge",
}

SUITES: dict[str, tuple[str, ...]] = {
    "mini": ("mini-gsm8k", "mini-gsm8k-sampled", "mini-humaneval", "mini-mt-bench"),
    "openllm-v1": tuple(name for name in TASKS if name.startswith("openllm-v1/")),
}

HARNESS: dict[str, bool] = {"lm-eval": False, "lm-eval-chat": True}
"""What stands before the name of a task of lm-eval, and whether it is asked in the chat template."""


def load_task(name: str, data_dir: Path | None = None) -> Task:
    """The task of that name (TASK, TASK/PROTOCOL, lm-eval:NAME), or the one at "module:ATTRIBUTE".

    Args:
        data_dir: folder that may hold definitions for lm-eval.

    Raises:
        UserError: the name is unknown (the nearest one is offered, or the protocols of the task), or the attribute is not a task.
        MissingLibraryError: it needs a library that is not installed.
    """
    harness, of_file = _harness_name(name), _of_file(name)
    if harness is not None:
        loaded = importlib.import_module("gsil_bench.tasks.lm_eval").harness_task(*harness, data_dir)
    elif of_file is not None:
        loaded = importlib.import_module("gsil_bench.tasks.summarization").file_task(*of_file)
    else:
        loaded = _attribute(name, TASKS.get(ALIASES.get(name, name), name))
    if not isinstance(loaded, Task):
        raise UserError(f"task {name!r} is not a Task (see gsil_bench/tasks/task.py)")
    return loaded


def expand(names: list[str]) -> list[str]:
    """Task names with every suite replaced by its tasks and every alias by what it stands for, order kept, repeats dropped."""
    members = [task for name in names for task in SUITES.get(name, (name,))]
    return list(dict.fromkeys(ALIASES.get(name, name) for name in members))


def is_task(name: str) -> bool:
    """Whether a name means a task or several, wherever else files are named too."""
    made = ":" in name and (_harness_name(name) or _of_file(name))
    return name in TASKS or name in ALIASES or name in SUITES or bool(made)


def _harness_name(name: str) -> tuple[str, bool] | None:
    """The name of a task of lm-eval, and whether it is asked in the chat template; None for another name."""
    for prefix, chat in HARNESS.items():
        for separator in ":/":
            if name.startswith(prefix + separator) and len(name) > len(prefix) + 1:
                return name[len(prefix) + 1 :], chat
    return None


def _of_file(name: str) -> tuple[str, str] | None:
    """The file of a summarization task that is made of one, and its protocol; None for another name."""
    head, _, file = name.partition(":")
    task, slash, protocol = head.partition("/")
    if task == "summarization" and head != name and not file:
        raise UserError(f"task {name!r}: name the file, summarization:FILE")
    return (file, protocol if slash else "rouge") if task == "summarization" and file else None


def _attribute(name: str, target: str) -> Any:
    module, colon, attribute = target.partition(":")
    if not colon:
        raise _unknown(name)
    try:
        return getattr(importlib.import_module(module), attribute)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # a user's module may raise anything while it is imported
        raise UserError(f"task {name!r} cannot be loaded: {type(error).__name__}: {error}") from error


def _unknown(name: str) -> UserError:
    """The error for a name that is not listed: of a known task, it is the protocol that is not known."""
    task, slash, protocol = name.partition("/")
    protocols = [other.removeprefix(f"{task}/") for other in TASKS if other.startswith(f"{task}/")]
    if slash and protocols:
        return unknown_name(f"protocol of {task}", protocol, protocols)
    return unknown_name("task", name, [*TASKS, *ALIASES, *SUITES, *(f"{prefix}:NAME" for prefix in HARNESS)])
