"""Run a plan in this process, stage by stage. A stage that fails takes with it only the cells that need it."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from gsil_bench.errors import StoreError
from gsil_bench.estimate import Speeds
from gsil_bench.interrupt import Interrupts
from gsil_bench.plan import Cell, Plan, Stage
from gsil_bench.records import write_atomically
from gsil_bench.reporting.progress import Reporter, Stopwatch, seconds_text
from gsil_bench.stages import Resources, Workspace
from gsil_bench.store import Artefact, Produced, Store

SHORTCUTS = ("length", "finish_reason", "first_token")
"""Features whose AUC is shown beside the self-generations."""


@dataclass
class Outcome:
    """What became of a plan."""

    made: dict[str, Artefact] = field(default_factory=dict)
    """Stage key → artefact, found or made."""
    failed: dict[str, str] = field(default_factory=dict)
    """Stage key → why: its own failure or that of a stage it needs."""
    executed: list[str] = field(default_factory=list)
    """Labels of the stages that did work, in order."""

    def reason(self, cell: Cell) -> str | None:
        """Why a cell has no score, or None."""
        return self.failed.get(cell.scores.key)


@dataclass
class LocalRun:
    """Runs plans here.

    Args:
        failures: folder for the tracebacks of failed stages.
    """

    store: Store
    resources: Resources
    reporter: Reporter
    interrupts: Interrupts
    failures: Path
    outcome: Outcome = field(default_factory=Outcome)
    made_here: set[str] = field(default_factory=set)
    """Keys of the stages that this process ran."""

    def execute(self, plan: Plan, finished: Callable[[Cell, Outcome], None]) -> Outcome:
        """Make every stage that is not there yet; `finished` is called with each cell as soon as its scores exist.

        Raises:
            KeyboardInterrupt: a signal came; what was done is kept.
            StoreError: the store cannot be written.
        """
        watch, waiting = Stopwatch(), list(plan.cells)
        total, number = sum(stage.given is None for stage in plan.stages), 0
        for stage in plan.stages:
            self.interrupts.check()
            number += stage.given is None
            self._make(stage, f"[{number}/{total}]")
            for cell in [cell for cell in waiting if cell.scores.key in self.outcome.made]:
                waiting.remove(cell)
                finished(cell, self.outcome)
        done = len(self.outcome.executed)
        if done or self.outcome.failed:
            self.reporter.line(f"{done} of {total} stages run in {seconds_text(watch.seconds)}")
        else:
            self.reporter.line("nothing to do: every stage was there")
        return self.outcome

    def _make(self, stage: Stage, number: str) -> None:
        """Find or make one stage's artefact and note what became of it."""
        outcome = self.outcome
        blocked = [outcome.failed[need.key] for need in stage.needs.values() if need.key in outcome.failed]
        if blocked:
            outcome.failed[stage.key] = blocked[0]
            return
        found = stage.given or self.store.lookup(stage.kind, stage.fingerprint(outcome.made))
        if found is not None:
            outcome.made[stage.key] = found
            return
        watch = Stopwatch()
        try:
            made = self._build(stage)
        except (KeyboardInterrupt, StoreError):
            raise
        except Exception as error:  # whatever a stage raises must not take the other cells with it
            self._failed(stage, number, error)
            return
        outcome.made[stage.key] = made
        if stage.key not in self.made_here:  # another process was faster
            return
        outcome.executed.append(stage.label)
        Speeds.of(self.store).observe(stage, self.resources.inputs.model, made.seconds)
        self.reporter.line(f"{number} {stage.label}  {seconds_text(watch.seconds)}{_remark(made)}")
        for warning in made.facts.get("warnings", ()):
            self.reporter.line(f"warning: {warning}", style="yellow")

    def _build(self, stage: Stage) -> Artefact:
        needs = {name: self.outcome.made[need.key] for name, need in stage.needs.items()}
        with self.reporter.stage(stage.label, stage.units) as bar:

            def advance(done: int) -> None:
                bar(done)
                self.interrupts.check()

            def make(folder: Path) -> Produced:
                if stage.run is None:
                    raise RuntimeError(f"{stage.label} can be neither found nor made")
                self.made_here.add(stage.key)
                return stage.run(Workspace(folder, needs, self.resources))

            self.resources.advance = advance
            return self.store.build(
                stage.kind,
                stage.fingerprint(self.outcome.made),
                {**stage.inputs, "needs": {name: artefact.content for name, artefact in needs.items()}},
                make,
                waiting=lambda: self.reporter.line(f"another process is making: {stage.label}; waiting for it"),
                poll=self.interrupts.check,
            )

    def _failed(self, stage: Stage, number: str, error: Exception) -> None:
        reason = f"{type(error).__name__}: {error}".strip().split("\n")[0]
        self.outcome.failed[stage.key] = f"{stage.label}: {reason}"
        path = self.failures / f"{stage.kind}-{stage.key[:12]}.txt"
        write_atomically(path, f"{stage.label}\n\n{traceback.format_exc()}")
        self.reporter.line(f"{number} FAILED {stage.label}: {reason} (traceback: {path})", style="bold red")


def _remark(artefact: Artefact) -> str:
    """What a reader should see of a stage besides its time."""
    facts = artefact.facts
    if facts.get("step_zero") is not None:
        moved = ""
        if "generated_displacement" in facts:
            sides = (facts["real_displacement"], facts["generated_displacement"])
            moved = "; log-probs moved by {:+.1f} (demonstrations), {:+.1f} (self-generations) nats".format(*sides)
        return f"  step 0: |log-ratio| <= {facts['step_zero']:.1e} nats (noise floor {facts['noise_floor']:.1e}){moved}"
    if "equal_to_demonstration" in facts:
        share = facts["truncated"] / max(1, facts["generations"])
        known = {name: facts["shortcuts"].get(f"{name}_auc") for name in SHORTCUTS}
        aucs = ", ".join(f"{name.replace('_', ' ')} {auc:.2f}" for name, auc in known.items() if isinstance(auc, float))
        return (
            f"  {share:.0%} cut at the token limit, {facts['equal_to_demonstration']} equal to their demonstration; "
            f"shortcuts (AUC): {aucs}"
        )
    return ""
