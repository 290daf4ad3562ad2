"""Compare ways of learning from demonstrations: the one command, and the only place that composes all stages.

    python -m gsil_bench.compare --methods sft,gsil-logistic

Read inputs → plan → run the stages that are not there yet → a result file per cell → tables. Exit codes: 0 all cells have
results, 1 some failed, 2 bad input (one line says what), 130 interrupted (the same command continues).
"""

from __future__ import annotations

import dataclasses
import inspect
import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.console import Console

import baselines
from gsil_bench.config import Config, parse_pairs, parse_settings, resolve
from gsil_bench.errors import UserError

if TYPE_CHECKING:
    from gsil_bench.plan import Plan
    from gsil_bench.records import CellFailure, CellResult
    from gsil_bench.reporting.comparison import Comparison

RECIPES = Path(baselines.__file__).parent / "recipes"
INTERRUPTED = 130
"""Exit code after a signal."""


@dataclass(frozen=True)
class Options:
    """What is about this call and not about the comparison."""

    dry_run: bool = False
    as_json: bool = False


@dataclass(frozen=True)
class Finished:
    """What became of a plan, in its order."""

    plan: Plan
    results: list[CellResult]
    failures: list[CellFailure]


def run(config: Config, options: Options = Options()) -> int:
    """Compare, print the table, and return the exit code."""
    from gsil_bench.inputs import read_inputs
    from gsil_bench.plan import Planner

    plan = Planner(read_inputs(config)).plan()
    if options.dry_run:
        show_plan(plan, options.as_json)
        return 0
    finished = carry_out(plan, Path(config.out))
    if finished is None:
        return INTERRUPTED
    show(finished, Path(config.out), options.as_json)
    return 1 if finished.failures else 0


def show_plan(plan: Plan, as_json: bool) -> None:
    """Print what would be done, and write nothing."""
    from gsil_bench.reporting.plan_view import plan_record, plan_text
    from gsil_bench.store import Store

    store = Store(Path(plan.inputs.config.out) / "store")
    print(json.dumps(plan_record(plan, store), indent=1) if as_json else plan_text(plan, store, every_stage=True))


def carry_out(plan: Plan, folder: Path) -> Finished | None:
    """Run the stages of a plan that are not in the store below --out yet, and write a result for each cell.

    Args:
        folder: of the results, the resolved configuration and the tracebacks of failures.

    Returns:
        None if a signal stopped it.
    """
    from gsil_bench.execution.local import LocalRun
    from gsil_bench.interrupt import Interrupts
    from gsil_bench.records import CellFailure
    from gsil_bench.reporting.plan_view import plan_text
    from gsil_bench.reporting.progress import Reporter
    from gsil_bench.results import remove_result, write_result
    from gsil_bench.stages import Resources
    from gsil_bench.store import Store
    from gsil_bench.tasks.task import ScoringResources

    inputs, config, reporter = plan.inputs, plan.inputs.config, Reporter()
    store = Store(Path(config.out) / "store")
    reporter.line(plan_text(plan, store))
    write_config(config, folder)
    consent = config.allow_code_execution
    scoring = ScoringResources(allow_code_execution=consent, judge=inputs.judge, learned=inputs.learned)
    resources = Resources(inputs, scoring=scoring)
    results: list[CellResult] = []
    with Interrupts() as interrupts:
        execution = LocalRun(store, resources, reporter, interrupts, folder / "failures")
        try:
            outcome = execution.execute(
                plan, lambda cell, outcome: results.append(write_result(folder, cell, inputs, outcome.made))
            )
        except KeyboardInterrupt:
            reporter.line("interrupted; everything done so far is kept, the same command continues from here")
            return None
        finally:
            resources.release()
    failures = []
    for cell in plan.cells:
        reason = outcome.reason(cell)
        if reason is not None:
            failures.append(CellFailure(cell.method.name, cell.seed, cell.task, reason))
            remove_result(folder, cell)
    order = {(cell.method.name, cell.seed, cell.task): number for number, cell in enumerate(plan.cells)}
    results.sort(key=lambda result: order[result.method, result.seed, result.task])
    return Finished(plan, results, failures)


def show(finished: Finished, out: Path, as_json: bool) -> None:
    """The comparison of a plan's results."""
    from gsil_bench.reporting.comparison import Comparison
    from gsil_bench.reporting.page import write_page
    from gsil_bench.results import budget_notes, warning_notes

    plan, results = finished.plan, finished.results
    inputs = plan.inputs
    comparison = Comparison.of(
        results,
        finished.failures,
        methods=list(dict.fromkeys(cell.method.name for cell in plan.cells)),
        tasks=list(dict.fromkeys(cell.task for cell in plan.cells)),
        control=inputs.control,
        notes=[*inputs.notes, *budget_notes(plan, results), *warning_notes(results)],
    )
    show_comparison(comparison, out, as_json)
    print(f"page: {write_page(out)}", file=sys.stderr)


def show_comparison(comparison: Comparison, out: Path, as_json: bool) -> None:
    """Write the tables below `out` and print one."""
    from gsil_bench.records import write_atomically
    from gsil_bench.reporting import tables
    from gsil_bench.reporting.terminal import render_terminal
    from gsil_bench.reporting.wording import render_summary

    files = {
        out / "table.md": tables.render_markdown(comparison),
        out / "table.csv": tables.render_csv(comparison),
        out / "table.tex": tables.render_latex(comparison),
        out / "table.txt": render_terminal(comparison, width=100),
        out / "table.json": json.dumps(tables.render_json(comparison), indent=1, ensure_ascii=False) + "\n",
    }
    for path, text in files.items():
        write_atomically(path, text)
    if as_json:
        print((out / "table.json").read_text(encoding="utf-8"), end="")
        return
    console = Console(highlight=False)
    print(render_terminal(comparison, width=console.width if console.is_terminal else 100, colour=console.is_terminal))
    for line in render_summary(comparison):
        print(line)
    print(f"\nfiles: {', '.join(str(path) for path in files)}; results of every cell: {out / 'results'}")


def write_config(config: Config, out: Path) -> None:
    """The resolved configuration, as a recipe that gives the same comparison."""
    from gsil_bench.records import write_atomically

    try:
        write_atomically(out / "config.yaml", yaml.safe_dump(config.as_dict(), sort_keys=False, allow_unicode=True))
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; choose another folder") from error


def guarded(action: Callable[[], int]) -> int:
    """The exit code of an action: bad input is one line and 2, Ctrl-C before anything ran is 130."""
    try:
        return action()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {' '.join(str(error).split())}; what was done is kept, the same command continues", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def compare(
    methods: Annotated[
        str | None, typer.Option(help="Names separated by commas, or module:ATTRIBUTE. [sft,gsil-logistic]")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Folder, hub id, or mini (the embedded model). [mini]")] = None,
    demonstrations: Annotated[
        str | None, typer.Option(help="File, folder, hub id or task name. [the train splits of the compared tasks]")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Names separated by commas; a suite's name stands for its tasks. [mini]")
    ] = None,
    split: Annotated[str | None, typer.Option(help="test to report, dev to choose settings. [test]")] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds separated by commas. [0]")] = None,
    generation_seed: Annotated[
        str | None, typer.Option(help="Draw self-generations with this seed in all runs: a sweep pays for them once. [the run's]")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="METHOD.SETTING=VALUE", help="Change a method's setting; repeatable.")
    ] = None,
    field: Annotated[
        list[str] | None, typer.Option("--field", metavar="FIELD=NAME", help="How the file names a field; repeatable.")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="YAML file, or the name of a packaged recipe; flags override it.")] = None,
    control: Annotated[
        str | None, typer.Option(help="Method that differences are taken from. [sft-continued, or the first that trains]")
    ] = None,
    no_start: Annotated[bool, typer.Option("--no-start", help="Leave out the row of the untrained model.")] = False,
    every_round: Annotated[bool, typer.Option("--every-round", help="Also show every method after each of its rounds.")] = False,
    chat_template: Annotated[str | None, typer.Option(help="Jinja file or plain, for a tokenizer without one.")] = None,
    data_dir: Annotated[str | None, typer.Option(help="Folder searched for data files first; also GSIL_BENCH_DATA.")] = None,
    out: Annotated[str | None, typer.Option(help="Folder of results and artefacts. [runs]")] = None,
    limit: Annotated[str | None, typer.Option(help="Items per task. [all]")] = None,
    limit_demonstrations: Annotated[str | None, typer.Option(help="Demonstrations read. [all]")] = None,
    drop_long: Annotated[bool, typer.Option("--drop-long", help="Leave out demonstrations longer than the context.")] = False,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Consent to run generated code in the sandbox.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda. [auto]")] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="fp32, bf16 (fp32 master weights), bf16-autocast or nf4 (QLoRA). [bf16 on a GPU, fp32 on a CPU]"),
    ] = None,
    processes: Annotated[str | None, typer.Option(help="Processes that share each training step, one a GPU. [1]")] = None,
    sharded: Annotated[bool, typer.Option("--sharded", help="Divide the weights among them (FSDP2).")] = False,
    engine: Annotated[
        str | None, typer.Option(help="What completes prompts: transformers, vllm or endpoint. [vllm with a GPU, if installed]")
    ] = None,
    engine_set: Annotated[
        list[str] | None, typer.Option("--engine-set", metavar="KEY=VALUE", help="Change an engine's option; repeatable.")
    ] = None,
    judge: Annotated[str | None, typer.Option(help="What rates MT-Bench: endpoint, engine, replay, or module:ATTRIBUTE.")] = None,
    judge_set: Annotated[
        list[str] | None, typer.Option("--judge-set", metavar="KEY=VALUE", help="Change a judge's option; repeatable.")
    ] = None,
    learned_metric: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Also compare summaries with their references by this model's states.")
    ] = None,
    trackers: Annotated[
        str | None, typer.Option(help="Also send metrics of training to tensorboard, wandb, mlflow or trackio.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """Train every method on the same demonstrations, evaluate every checkpoint, print a table with verdicts."""
    given = locals()
    raise typer.Exit(guarded(lambda: run(config_of(given), Options(dry_run, as_json))))


SWITCHED_OFF = {"no_start": "start"}
"""Flags that take something away, and the field that they make false."""


def config_of(given: Mapping[str, Any]) -> Config:
    """The configuration that options of `compare` ask for.

    Args:
        given: parameter of `compare` → value, as typer gives it; parameters that are no field of Config are left out.

    Raises:
        UserError: whatever is wrong with them.
    """
    from gsil_bench.inputs import check_targets

    pairs = {"field": "prompt=question", "engine_set": "batch_invariant=true", "judge_set": "model=NAME"}
    fields = [item.name for item in dataclasses.fields(Config)]
    flags = {key: value for key, value in given.items() if key in fields and key not in pairs and value not in (None, False)}
    flags |= {name: False for flag, name in SWITCHED_OFF.items() if given.get(flag)}
    flags |= {"set": parse_settings(given["set_"])} if given.get("set_") else {}
    for key, example in pairs.items():
        if given.get(key):
            flags["fields" if key == "field" else key] = parse_pairs(
                f"--{key.replace('_', '-')}", given[key], example, may_be_empty=key != "field"
            )
    config = resolve(flags, given.get("recipe"), RECIPES)
    check_targets(flags.get("set", {}), config.methods, config.variants)
    return config


def with_options(own: Callable[..., None], without: Sequence[str] = ()) -> Callable[..., None]:
    """A verb with its own options and those of `compare`, which its last parameter `**options` receives.

    Args:
        own: the verb's function.
        without: parameters of `compare` that make no sense here.
    """
    mine = list(inspect.signature(own, eval_str=True).parameters.values())[:-1]
    taken = {*(parameter.name for parameter in mine), *without}
    theirs = [each for each in inspect.signature(compare, eval_str=True).parameters.values() if each.name not in taken]

    def verb(**given: Any) -> None:
        own(**given)

    verb.__name__, verb.__doc__, verb.__annotations__ = own.__name__, own.__doc__, {}
    # typer reads the options from the signature
    parameters = [each.replace(kind=each.KEYWORD_ONLY) for each in (*mine, *theirs)]
    verb.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return verb


def call(app: typer.Typer, arguments: Sequence[str] | None = None) -> int:
    """Run a command line; a flag that does not exist is one line and exit code 2, like all bad input."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a table must not be lost to a terminal without ±
    try:
        return int(app(list(sys.argv[1:] if arguments is None else arguments), standalone_mode=False) or 0)
    except Exception as error:
        # Typer brings its own copy of click's errors; what they share is that they can format themselves.
        if not hasattr(error, "format_message"):
            raise
        message = str(error.format_message())
        near = [] if "ossible" in message else getattr(error, "possibilities", None) or []
        hint = f" Did you mean {', '.join(near)}?" if near else ""
        print(message if message.startswith("Usage:") else f"error: {' '.join(message.split())}{hint}", file=sys.stderr)
        return 2


def main() -> None:
    """Entry point of `python -m gsil_bench.compare`."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(compare)
    sys.exit(call(app))


if __name__ == "__main__":
    main()
