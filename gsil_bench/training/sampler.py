"""The policy in training as a generation engine serves it: sampled where it is, or from a copy of its weights that is kept up."""

from __future__ import annotations

import dataclasses
import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gsil_bench.generation.engine import Completion, Engine, EngineError, Reloadable, Request
from gsil_bench.generation.engines import Options, Served
from gsil_bench.models.adapters import merged_weights
from gsil_bench.models.packing import TokenTree

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

PROBES, PROBE_TOKENS = 4, 512
"""Samples that tell whether an engine has taken new weights, and tokens of each at most."""
REFUSED, ROUNDING = 3.0, 1e-4
"""How many times the gap after a start a reloaded engine may have, and the gap in nats that is rounding in any case."""


class Sampler:
    """The policy in training, behind the engine that also serves finished checkpoints.

    An engine in this process samples from the weights as they are. Another one is given a copy on disk, which is gone as soon as
    it is loaded: it changes its weights while it runs, if it can, or is started anew at every sampling.

    Whether new weights were taken is asked of the first samples: their log-probs by engine and by model, `gap` nats apart on
    average. Right after a start that is the engine's own rounding. If it is more than REFUSED times that after a reload, another
    engine is started; if that one is closer to the model, the running one had not taken all weights, and is not asked to again.
    """

    def __init__(self, options: Options, served: Served, scratch: Path) -> None:
        """Prepare.

        Args:
            options: of the engine.
            served: all that the engine has to know of the model but its weights.
            scratch: a folder for the copy of them; what it holds is deleted.
        """
        self._options, self._served, self._scratch = options, served, scratch
        self._engine: Engine | None = None
        self._probe: list[TokenTree] = []
        self._rounding = math.nan
        """The gap after the last start."""
        self._trusted = True
        """Whether a reload is still tried."""

    @property
    def is_exact(self) -> bool:
        """Whether its log-probs must be those of training but for rounding."""
        return self._options.in_process and self._served.dtype == "fp32" and not self._served.autocast

    def complete(self, model: PreTrainedModel, requests: Sequence[Request]) -> list[Completion]:
        """The completions, in order."""
        if self._engine is None:
            self._engine = self._start(model)
        elif not self._options.in_process:
            self._engine = self._reload(self._engine, model)
        found = dict(self._engine.complete(requests))
        completions = [found[index] for index in range(len(requests))]
        if not self._options.in_process:
            self._keep(self._engine, model, _texts(requests, completions))
        return completions

    def close(self) -> None:
        """End the engine; the next samples start another."""
        if self._engine is not None:
            self._engine.close()
        self._engine = None

    def _keep(self, engine: Engine, model: PreTrainedModel, texts: list[TokenTree]) -> None:
        """Keep the engine for the next samples if it can be given new weights, and end it otherwise."""
        if not (isinstance(engine, Reloadable) and engine.reloads and self._trusted):
            self.close()
        elif not self._probe:
            self._probe = texts
            self._rounding = self._gap(engine, model)

    def _start(self, model: PreTrainedModel) -> Engine:
        if self._options.in_process:
            return self._options.make(dataclasses.replace(self._served, load=lambda: model))
        with self._copy(model) as folder:
            return self._options.make(dataclasses.replace(self._served, folder=folder))

    def _reload(self, engine: Engine, model: PreTrainedModel) -> Engine:
        """The engine with the model's weights, or another one that was started on them."""
        assert isinstance(engine, Reloadable)
        try:
            with self._copy(model) as folder:
                engine.reload(folder)
            gap = self._gap(engine, model)
            reason = f"after it, log-probs were {gap:.2g} nats per token from the policy's"
        except EngineError as error:
            gap, reason = math.nan, str(error)
        if gap <= max(ROUNDING, REFUSED * self._rounding):
            return engine
        self.close()
        self._engine = self._start(model)
        self._rounding = self._gap(self._engine, model)
        if not gap <= max(ROUNDING, REFUSED * self._rounding):
            self._trusted = False
            logger.warning("sampling: the engine cannot be given new weights while it runs, so it is started anew: %s", reason)
        return self._engine

    @torch.no_grad()
    def _gap(self, engine: Engine, model: PreTrainedModel) -> float:
        """Mean difference between the engine's log-prob of a token and the model's own, over the probe, in nats."""
        device = model.device
        differences = []
        for tree, [theirs] in zip(self._probe, engine.logps(self._probe), strict=True):
            [completion] = tree.completions
            ids = torch.tensor([tree.prompt_ids + completion], device=device)
            with torch.autocast(device.type, torch.bfloat16, enabled=self._served.autocast):
                logits = model(input_ids=ids, use_cache=False).logits[0, -len(completion) - 1 : -1]
            own = logits.float().log_softmax(1).gather(1, ids[0, -len(completion) :, None]).squeeze(1).cpu()
            differences.append((own - torch.tensor(theirs)).abs())
        return float(torch.cat(differences).mean()) if differences else math.nan

    @contextmanager
    def _copy(self, model: PreTrainedModel) -> Iterator[Path]:
        """The policy as a checkpoint without adapters, whole or not there, for as long as the block lasts."""
        partial = self._scratch.with_name(f"{self._scratch.name}.partial")
        try:
            for folder in (partial, self._scratch):  # of a run that was killed
                shutil.rmtree(folder, ignore_errors=True)
            model.save_pretrained(partial, state_dict=merged_weights(model))
            partial.rename(self._scratch)
            yield self._scratch
        finally:
            for folder in (partial, self._scratch):
                shutil.rmtree(folder, ignore_errors=True)


def _texts(requests: Sequence[Request], completions: Sequence[Completion]) -> list[TokenTree]:
    """The first samples for a probe: whole, and their first tokens alone, whose prompts an engine may have kept."""
    trees = []
    for request, completion in list(zip(requests, completions, strict=True))[:PROBES]:
        ids = (request.prompt_ids + completion.tokens)[:PROBE_TOKENS]
        trees += [TokenTree(ids[:1], (ids[1:],))] if len(ids) > 1 else []
        trees += [TokenTree(request.prompt_ids, (completion.tokens[:1],))] if completion.tokens else []
    return trees
