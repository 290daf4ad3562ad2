"""From a finished comparison to the files of a pull request: `gsil-bench submit RUN`.

Refused are cells without a result (a failed stage, a failed canary), runs on the dev split, runs with --limit unless they are
marked as such, and whatever `gsil-bench leaderboard check` would refuse. Rows that show a method before its last round are left
out.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from gsil_bench.errors import UserError, unknown_name
from gsil_bench.leaderboard.check import check_entries
from gsil_bench.leaderboard.entries import RESULTS, Entry, Said, entry_of, entry_text, read_entries
from gsil_bench.leaderboard.schema import LINK, SCHEMA, problems
from gsil_bench.records import CellResult, result_from_json, write_atomically
from gsil_bench.reporting.wording import one_line
from gsil_bench.variants import ROUND


@dataclass(frozen=True)
class Submission:
    """What would be, or was, written."""

    written: tuple[Path, ...]
    """New or changed files."""
    kept: int
    """Files that were there with the same content."""
    warnings: tuple[str, ...]
    """What the submitter should read before committing, each once."""


def submit(run: Path, to: Path, methods: Sequence[str] | None, said: Said, allow_limit: bool, replace: bool) -> Submission:
    """Write a run's cells below a leaderboard's results.

    Args:
        run: the --out folder of a comparison.
        to: the leaderboard's folder, or its results/.
        methods: only these; all by default.
        said: tuning, links.
        allow_limit: take a run whose tasks were cut by --limit; its entries say so and share no table with full ones.
        replace: overwrite entries of the same cells that hold something else.

    Raises:
        UserError: whatever is refused, with nothing written.
    """
    folder = to.parent if to.name == RESULTS else to
    _check_links(said)
    results = [result for result in _chosen(run, _read(run), methods) if "after_round" not in result.record]
    _check_said(said, results)
    said = dataclasses.replace(said, tuning=_checked_tuning(said.tuning, results))
    _check_complete(run, results, whole=methods is None)
    _check_full(run, results, allow_limit)
    entries = [entry_of(result, said) for result in results]
    _check_with_others(folder, entries)
    texts = {folder / entry.path: entry_text(entry.data) for entry in entries}
    changed = [path for path, text in texts.items() if _content(path) != text]
    taken = [path for path in changed if path.exists()]
    if taken and not replace:
        raise UserError(f"{taken[0]} holds another result of this cell ({len(taken)} such); --replace overwrites them")
    for path in changed:
        write_atomically(path, texts[path])
    return Submission(tuple(changed), len(texts) - len(changed), tuple(_warnings(entries)))


def report(done: Submission, to: Path) -> str:
    """What was written, what to read before committing, and what to commit."""
    folder = to.parent if to.name == RESULTS else to
    lines = [f"warning: {line}" for line in map(one_line, done.warnings)]
    lines += [f"{len(done.written)} results written, {done.kept} were there already"]
    if done.written:
        folders = sorted({str(path.parent) for path in done.written})
        lines += [f"  {path}" for path in folders]
    lines += ["", "For a pull request:", f"  gsil-bench leaderboard build {folder}", f"  gsil-bench leaderboard check {folder}"]
    return "\n".join([*lines, f"  git add {folder} && git commit -m 'Leaderboard: …'"])


def read_tuning(path: Path) -> dict[str, dict[str, Any]]:
    """Method → how it was tuned, from the tuning.json of `gsil-bench tune`, or YAML or JSON of one's own.

    Raises:
        UserError: the file cannot be read, or a record is not one of the schema's.
    """
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)  # YAML takes JSON's 1e-05 for a text
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"--tuning {path}: {error}") from error
    if not isinstance(data, dict) or not data:
        raise UserError(f"--tuning {path}: expected METHOD → {{search_space: …, trials: …, split: dev}}")
    if all(key in data for key in ("space", "methods")):
        data = _of_tune(data)
    schema = SCHEMA["properties"]["tuning"]
    for method, record in data.items():
        plain = {key: value for key, value in record.items() if key != CHOSEN} if isinstance(record, dict) else record
        for line in problems(plain, schema, f"{method}"):
            raise UserError(f"--tuning {path}: {line}")
    return {str(method): record for method, record in data.items()}


CHOSEN = "chosen"
"""Where a tuning carries what was chosen until it has been compared with what was run."""


def _of_tune(data: Mapping[str, Any]) -> dict[str, Any]:
    """What `gsil-bench tune` wrote, in the schema's words, with what it chose."""
    shared = {key: data[key] for key in ("split", "objective", "seeds") if key in data}
    return {
        method: {
            "search_space": data["space"].get(method, {}),
            "trials": len(tuned["trials"]),
            **shared,
            CHOSEN: (tuned["chosen"] or {}).get("settings", {}),
        }
        for method, tuned in data["methods"].items()
    }


def _checked_tuning(tuning: Mapping[str, Mapping[str, Any]], results: Sequence[CellResult]) -> dict[str, dict[str, Any]]:
    """Tuning as entries hold it, if the settings that were run are those that were chosen.

    Raises:
        UserError: they are not.
    """
    for result in results:
        record = result.record
        used = {**record.get("training", {}), **record.get("protocol", {}), **record.get("settings", {})}
        for key, value in tuning.get(result.method, {}).get(CHOSEN, {}).items():
            if used.get(key) != value:
                raise UserError(
                    f"{result.method} was tuned to {key}={value}, but this run used {used.get(key)}: run it with the recipe of "
                    "the tuning, or name another --tuning file"
                )
    return {method: {key: value for key, value in found.items() if key != CHOSEN} for method, found in tuning.items()}


def _read(run: Path) -> list[CellResult]:
    """Every result of a comparison's folder, the held-out loss included, in the order of the files."""
    results = []
    for path in sorted((run / "results").rglob("*.json")):
        try:
            results.append(result_from_json(json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path} is not a result that this version reads ({error}); run the comparison again") from error
    if not results:
        raise UserError(f"{run}: no results below {run / 'results'}; name the --out folder of a comparison")
    return results


def _chosen(run: Path, results: Sequence[CellResult], methods: Sequence[str] | None) -> list[CellResult]:
    """Those of the methods that were asked for."""
    there = sorted({result.method for result in results})
    for name in methods or ():
        if name not in there:
            raise unknown_name(f"method of {run}", name, there)
    return [result for result in results if methods is None or result.method in methods]


def _check_links(said: Said) -> None:
    for flag, link in [("--link", said.link), *(("--source", link) for link in said.sources.values())]:
        if any(problems(link, LINK)):
            raise UserError(f"{flag} {link}: must begin with https:// or http:// and hold no spaces, quotes or angle brackets")


def _check_said(said: Said, results: Iterable[CellResult]) -> None:
    """Raise UserError for a link to the code of a method that is not submitted."""
    names = {result.method for result in results}
    for name in said.sources:
        if name not in names:
            raise unknown_name("method in --source (not among those submitted)", name, names)


def _check_complete(run: Path, results: Sequence[CellResult], whole: bool) -> None:
    """Raise UserError if a method lacks a task or a seed that the run is about."""
    configuration = _configuration(run)
    tasks = sorted({result.task for result in results} | _asked_tasks(run))
    trained = {result.method for result in results if _trained(result)}
    seeds = sorted({result.seed for result in results if result.method in trained} | set(configuration.get("seeds", ())))
    # A method from outside is named by its module there, not by its own name.
    named = {str(name) for name in configuration.get("methods") or () if ":" not in str(name)}
    asked = {name for name in _asked_methods(run) | named if not ROUND.search(name)} if whole else set()
    methods = {result.method for result in results} | asked
    there = {(result.method, result.seed, result.task) for result in results}
    untrained = {result.method for result in results} - trained
    wanted = [cell for cell in product(sorted(methods - untrained), seeds, tasks) if cell not in there]
    wanted += [(name, seeds[0] if seeds else 0, task) for name in sorted(untrained) for task in tasks
               if not any((method, of) == (name, task) for method, _, of in there)]  # fmt: skip
    if wanted:
        method, seed, task = wanted[0]
        reason = _reasons(run).get((method, task), "its stages failed or were not run")
        more = f" (and {len(wanted) - 1} more cells)" if len(wanted) > 1 else ""
        raise UserError(f"{run}: no result of {method}, seed {seed}, on {task}{more}: {reason}; finish the comparison first")


def _trained(result: CellResult) -> bool:
    return result.record.get("loss") is not None


def _configuration(run: Path) -> Mapping[str, Any]:
    """The run's own recipe; empty if it has none."""
    try:
        found = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{run / 'config.yaml'}: {error}") from error
    return found if isinstance(found, dict) else {}


def _cells(run: Path) -> list[Mapping[str, Any]]:
    """The cells of the run's own table, where it has one: it knows the ones that failed."""
    try:
        cells = json.loads((run / "table.json").read_text(encoding="utf-8"))["cells"]
        return [cell for cell in cells if isinstance(cell, dict)]
    except (OSError, ValueError, KeyError, TypeError):
        return []  # no table: the results alone say what the run is about


def _asked_tasks(run: Path) -> set[str]:
    return {str(cell["task"]) for cell in _cells(run) if "task" in cell}


def _asked_methods(run: Path) -> set[str]:
    return {str(cell["method"]) for cell in _cells(run) if "method" in cell}


def _reasons(run: Path) -> dict[tuple[str, str], str]:
    """(method, task) → why a cell of the run failed."""
    return {(cell["method"], cell["task"]): str(cell["reason"]) for cell in _cells(run) if cell.get("reason")}


def _check_full(run: Path, results: Sequence[CellResult], allow_limit: bool) -> None:
    """Raise UserError for what is not the whole test split."""
    for result in results:
        configuration = result.provenance.get("configuration", {})
        split, limit = configuration.get("split"), configuration.get("limit")
        if split != "test":
            raise UserError(
                f"{run}: {result.method} was scored on the {split} split, which is for choosing settings; run it on test"
            )
        if limit is not None and not allow_limit:
            raise UserError(
                f"{run}: only the first {limit} items of each task were asked; run it without --limit, or pass --allow-limit "
                "to submit it marked as such"
            )


def _check_with_others(folder: Path, entries: Sequence[Entry]) -> None:
    """Raise UserError for what the leaderboard's own check would refuse once the files are there."""
    others: list[Entry] = []
    if (folder / RESULTS).is_dir():
        others, broken = read_entries(folder)
        if broken:
            raise UserError(f"{folder} holds what its check refuses: {broken[0]}")
    paths = {entry.path for entry in entries}
    together = [*(entry for entry in others if entry.path not in paths), *entries]
    found = check_entries(together)
    if found:
        raise UserError(f"the leaderboard's check would refuse this: {found[0]}" + (f" ({len(found)} such)" if found[1:] else ""))


def _content(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def _warnings(entries: Sequence[Entry]) -> list[str]:
    """Each once, with the methods that it holds for."""
    found: dict[str, list[str]] = {}
    for entry in entries:
        data, name = entry.data, f"{entry.method} (seed {entry.seed})"
        lines = list(data["warnings"])
        if data["provenance"]["commit"] is None:
            lines.append("the commit of gsil_bench is unknown: nobody can run this again exactly")
        elif data["provenance"]["dirty"]:
            lines.append(f"gsil_bench had changes that are not in commit {data['provenance']['commit'][:7]}")
        lines += [f"{data['unscored']} items of {entry.task} are unscored"] if data["unscored"] else []
        for line in lines:
            found.setdefault(line, []).append(name)
        if entry.trained and data["tuning"] is None:
            found.setdefault("no tuning is stated (--tuning)", []).append(entry.method)
    return [f"{_listed(dict.fromkeys(names))}: {line}" for line, names in found.items()]


def _listed(names: Iterable[str], limit: int = 4) -> str:
    all_names = list(names)
    return ", ".join(all_names[:limit]) + (f" and {len(all_names) - limit} more" if len(all_names) > limit else "")
