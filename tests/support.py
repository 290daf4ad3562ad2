"""What tests share: a task small enough to be answered in a second, methods that misbehave, log-probs to try losses on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from gsil_bench.methods import Method, PairLogProbs, TokenLogProbs
from gsil_bench.tasks.task import AnswerProtocol, Item, Score, ScoringResources, Split

GREEDY = AnswerProtocol("letters/greedy-v1", max_new_tokens=6)


@dataclasses.dataclass(frozen=True)
class LengthTask:
    """Full marks for an answer of at least one letter."""

    name: str = "letters"
    version: str = "1"
    summary: str = "Say anything that has a letter."
    metric: str = "accuracy"
    best: float = 1.0
    worst: float = 0.0
    runs_code: bool = False
    protocol: AnswerProtocol = GREEDY
    turns: int = 1

    def items(self, split: Split, data_dir: Path | None) -> Sequence[Item]:
        return [Item(f"{split}-{n}", (f"Say {n}.",) * self.turns, gold=("a",) * self.turns) for n in range(12)]

    def score(self, items: Sequence[Item], answers: Sequence[Sequence[str]], resources: ScoringResources) -> list[Score]:
        return [Score(float(any(c.isalpha() for c in turns[-1])), turns[-1], {"has_text": bool(turns[-1])}) for turns in answers]


@dataclasses.dataclass(frozen=True)
class Blind(LengthTask):
    """Gives everything full marks."""

    def score(self, items: Sequence[Item], answers: Sequence[Sequence[str]], resources: ScoringResources) -> list[Score]:
        return [Score(1.0, "fine") for _ in items]


TASK = LengthTask()
BLIND = Blind(name="blind")
SAMPLED = LengthTask(name="letters-sampled", protocol=AnswerProtocol("letters/sampled-v1", 6, temperature=1.0, samples=2))
TWO_TURNS = LengthTask(name="letters-twice", turns=2)
WANTS_CODE = LengthTask(name="letters-code", runs_code=True)


def _raises(pair: PairLogProbs) -> torch.Tensor:
    raise RuntimeError("this loss always fails")


def _margin(pair: PairLogProbs) -> torch.Tensor:
    return pair.generated_log_ratios - pair.real_log_ratios


def _forgetful(pair: PairLogProbs) -> torch.Tensor:
    return -pair.real_log_ratios


def _reads_tokens(pair: PairLogProbs) -> torch.Tensor:
    return -pair.real.sum(pair.real.logps)


def _reads_normalisers(pair: PairLogProbs) -> torch.Tensor:
    return -pair.real.sum(pair.real.logps + 0 * pair.real.normalisers)


def _make(sign: float):  # type: ignore[no-untyped-def]
    def loss(pair: PairLogProbs) -> torch.Tensor:
        return -sign * pair.policy_real_logps

    return loss


CLOSURE = Method("closure", "A loss that holds a value of its own.", _make(1.0))
LAMBDA = Method("lambda", "A loss without a name.", lambda pair: -pair.policy_real_logps)
MISSPELT = Method("misspelt", "A need that there is not.", _margin, needs=frozenset({"refrence"}))  # type: ignore[arg-type]
PREFERS = Method("prefers", "Needs rejected answers.", _margin, needs=frozenset({"preferences", "reference"}))
ODD_BATCHES = Method("odd", "Batches that there are not.", _margin, batches="all")  # type: ignore[arg-type]
TASK_OF_A_TAKEN_NAME = LengthTask(name="held-out-nll")


def _scaled(pair: PairLogProbs, scale: float) -> torch.Tensor:
    return -scale * pair.policy_real_logps


WRONG_SETTING = Method("wrong-setting", "A setting that the loss does not take.", _scaled, settings={"scal": 1.0})


def _epochs(pair: PairLogProbs, epochs: float) -> torch.Tensor:
    return -epochs * pair.policy_real_logps


TAKEN_SETTING = Method("taken", "A setting named like a field.", _epochs, settings={"epochs": 1.0})

RAISES = Method("raises", "Always fails.", _raises, needs=frozenset({"generated", "reference"}))
MARGIN = Method("margin", "The bare margin.", _margin, needs=frozenset({"generated", "reference"}))
FORGETFUL = Method("forgetful", "Reads the reference without asking for it.", _forgetful)
FORGETS_TOKENS = Method("forgets-tokens", "Reads tokens without asking for them.", _reads_tokens)
FORGETS_NORMALISERS = Method(
    "forgets-normalisers", "Reads normalisers and asks for tokens only.", _reads_normalisers, needs=frozenset({"tokens"})
)
TOKEN_MARGIN = Method(
    "token-margin", "A pairwise loss of tokens.", _margin, needs=frozenset({"generated", "reference", "tokens"})
)
BAD_NAME = Method("../escape", "A name that is a path.", _margin)
NOT_A_METHOD = 3


# Log-probs by hand, to try losses on.


def token_pairs(logps: torch.Tensor, normalisers: torch.Tensor | None = None, temperature: float = 1.0) -> PairLogProbs:
    """Four tokens: a demonstration of three and one of a single token. What is not given is NaN, and so is the other side."""
    nan = logps.detach() * torch.nan
    position, length, pair = torch.tensor([0, 1, 2, 0]), torch.tensor([3, 3, 3, 1]), torch.tensor([0, 0, 0, 1])
    real = TokenLogProbs(logps, nan if normalisers is None else normalisers, pair, position, length, 2, 3)
    other = TokenLogProbs(nan, nan, pair, position, length, 2, 3)
    unread = nan[:2]
    return PairLogProbs(real.sum(logps), unread, unread, unread, torch.tensor([3.0, 1.0]), unread, (real, other), temperature)


def four_tokens() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of four tokens over five words, fp64, (4, 5), and the demonstrated words, (4,)."""
    random = torch.Generator().manual_seed(0)
    return torch.randn(4, 5, generator=random, dtype=torch.float64).requires_grad_(), torch.tensor([1, 4, 0, 2])


def from_logits(z: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and normalisers of the targets, (tokens,) each."""
    return z.log_softmax(1).gather(1, targets[:, None]).squeeze(1), z.logsumexp(1)


def ratio_pairs(real: Sequence[float], generated: Sequence[float]) -> PairLogProbs:
    """Pairs with these log-ratios against a reference of −10 and −20; answers of 4 and of 5 tokens."""
    ones = torch.ones(len(real))
    sides = [(torch.tensor(side) - level).requires_grad_() for side, level in ((real, 10.0), (generated, 20.0))]
    return PairLogProbs(*sides, -10 * ones, -20 * ones, 4 * ones, 5 * ones)


def policy_gradients(losses: torch.Tensor, pair: PairLogProbs) -> list[float]:
    """Of the summed losses of one pair: in the policy's log-prob of the demonstration, and of the other answer."""
    return [float(part) for part in torch.autograd.grad(losses.sum(), (pair.policy_real_logps, pair.policy_generated_logps))]
