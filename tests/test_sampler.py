"""The policy in training behind an engine that runs elsewhere: which weights it has, and what is done where it has old ones."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Generator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from gsil_bench.errors import UserError
from gsil_bench.generation.engine import Completion, EngineError, Request, Sampling
from gsil_bench.generation.engines import Served
from gsil_bench.generation.transformers_engine import TransformersEngine, TransformersOptions
from gsil_bench.generation.vllm_engine import VllmEngine, VllmOptions
from gsil_bench.methods import load_method, with_settings
from gsil_bench.models.adapters import add_lora, merge_lora, merged_weights
from gsil_bench.models.checkpoint import load_model
from gsil_bench.models.packing import TokenTree
from gsil_bench.models.policy import Policy
from gsil_bench.training import loop, metrics
from gsil_bench.training.batches import Branch, ShuffledSteps, Tree
from gsil_bench.training.learner import TrainingError
from gsil_bench.training.rollouts import Company, OnPolicySteps
from gsil_bench.training.sampler import Sampler

needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")

REQUESTS = [Request((20 + n, 21, 22, 23), Sampling(6, 1.0, seed=5), n, True) for n in range(5)]


def served(folder: Path) -> Served:
    def load() -> Any:
        raise AssertionError("the policy in training is to be sampled")

    def spell(ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))

    return Served(folder, load, (4,), 256, spell, "cpu", "fp32", False, lambda text: list(map(int, text.split())), spell)


class Running:
    """An engine that has a model of its own, and takes from a checkpoint what `takes` says."""

    identity = "running"

    def __init__(self, options: Elsewhere, given: Served) -> None:
        self.options, self.reloads, self.model = options, options.told, load_model(given.folder)
        self.inner = TransformersEngine(self.model, given.end_token_ids, 256, given.decode)

    def complete(self, requests: Sequence[Request]) -> Generator[tuple[int, Completion], None, None]:
        for index, completion in self.inner.complete(requests):
            failed = self.options.log.count("reload") == self.options.fails_at
            yield index, Completion((), "", "error", "out of order") if failed else completion

    def logps(self, trees: Sequence[TokenTree]) -> list[list[tuple[float, ...]]]:
        off = self.options.off
        return [[tuple(logp + off for logp in logps) for logps in tree] for tree in self.inner.logps(trees)]

    def reload(self, folder: Path) -> None:
        self.options.log.append("reload")
        self.options.reload(self.model, load_model(folder))

    def close(self) -> None:
        self.options.log.append("close")


@dataclasses.dataclass(frozen=True)
class Elsewhere(TransformersOptions):
    """Options of `Running`; `log` says what was done."""

    in_process = False  # type: ignore[misc]
    takes: Callable[[str], bool] = lambda name: True
    told: bool = True
    error: str = ""
    fails_at: int = -1
    errors: list[float] = dataclasses.field(default_factory=lambda: [0.0])
    log: list[str] = dataclasses.field(default_factory=list)

    @property
    def off(self) -> float:
        """What log-probs of given tokens are off by."""
        return self.errors[0]

    def make(self, given: Served) -> Any:
        self.log.append("start")
        return Running(self, given)

    def reload(self, model: torch.nn.Module, newer: torch.nn.Module) -> None:
        if self.error:
            raise EngineError(self.error)
        own = dict(model.named_parameters())
        with torch.no_grad():
            for name, weight in newer.named_parameters():
                if self.takes(name):
                    own[name].copy_(weight)


def sample(sampler: Sampler, model: Any, times: int, tiny_model: Path) -> None:
    """Samples while the model changes, each time as the engine in this process draws them."""
    for time in range(times):
        if time:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.02)
        drawn = sampler.complete(model, REQUESTS)
        plain = Sampler(TransformersOptions(), served(tiny_model), Path("nowhere")).complete(model, REQUESTS)
        assert [completion.tokens for completion in drawn] == [completion.tokens for completion in plain]
        for one, other in zip(drawn, plain, strict=True):
            assert one.logps == pytest.approx(other.logps, abs=1e-5)


def test_a_running_engine_is_given_new_weights(tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One start, and no copy is left: neither of these weights nor of a run that was killed."""
    for name in ("copy", "copy.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half a fi")
    options = Elsewhere()
    sampler = Sampler(options, served(tiny_model), tmp_path / "copy")
    sample(sampler, load_model(tiny_model), 3, tiny_model)
    assert options.log == ["start", "reload", "reload"]
    sampler.close()
    sampler.close()
    assert options.log[3:] == ["close"]
    assert list(tmp_path.iterdir()) == [] and caplog.messages == []


@pytest.mark.parametrize("stale", ["", "model.embed_tokens", "model.norm", "self_attn.k_proj", "layers.1.mlp.down_proj"])
def test_old_weights_are_found_and_another_engine_is_started(
    tiny_model: Path, tmp_path: Path, stale: str, caplog: pytest.LogCaptureFixture
) -> None:
    """All weights, or some: the engine would go on with old ones, and nothing else tells."""
    options = Elsewhere(takes=lambda name: stale not in name)
    with caplog.at_level(logging.WARNING):
        sample(Sampler(options, served(tiny_model), tmp_path / "copy"), load_model(tiny_model), 3, tiny_model)
    assert options.log == ["start", "reload", "close", "start", "close", "start", "close"]
    [message] = caplog.messages
    assert "started anew: after it, log-probs were" in message


def test_an_engine_that_refuses_is_started_anew_and_the_reason_logged(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = Elsewhere(error="vllm-0.1 did not change its weights while it ran: no reload_weights")
    with caplog.at_level(logging.WARNING):
        sample(Sampler(options, served(tiny_model), tmp_path / "copy"), load_model(tiny_model), 3, tiny_model)
    assert options.log == ["start", "reload", "close", "start", "close", "start", "close"]
    [message] = caplog.messages
    assert message.endswith("started anew: vllm-0.1 did not change its weights while it ran: no reload_weights")


def test_an_engine_that_is_told_not_to_is_closed_after_every_sampling(tiny_model: Path, tmp_path: Path) -> None:
    options = Elsewhere(told=False)
    sample(Sampler(options, served(tiny_model), tmp_path / "copy"), load_model(tiny_model), 2, tiny_model)
    assert options.log == ["start", "close", "start", "close"]


def test_rounding_that_a_new_start_has_too_is_not_held_against_it(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Log-probs are 0.001 nats off, then 0.1: more than three times that, but a started engine is no closer. So it goes on."""
    options = Elsewhere(errors=[0.001])
    sampler, model = Sampler(options, served(tiny_model), tmp_path / "copy"), load_model(tiny_model)
    sampler.complete(model, REQUESTS)
    options.errors[0] = 0.0025
    sampler.complete(model, REQUESTS)
    assert options.log == ["start", "reload"]
    options.errors[0] = 0.1
    sampler.complete(model, REQUESTS)
    sampler.complete(model, REQUESTS)
    assert options.log == ["start", "reload", "reload", "close", "start", "reload"]
    assert caplog.messages == []


def test_the_gap_is_the_mean_difference_of_a_token(tiny_model: Path, tmp_path: Path) -> None:
    """All log-probs of one engine are 0.25 nats off, in either direction: so is their mean distance."""
    for off in (0.25, -0.25):
        options = Elsewhere(errors=[off])
        sampler, model = Sampler(options, served(tiny_model), tmp_path / "copy"), load_model(tiny_model)
        sampler.complete(model, REQUESTS)
        assert sampler._rounding == pytest.approx(0.25, abs=1e-5)


def adapted(folder: Path, targets: str = "all-linear") -> tuple[Any, Any]:
    """A model with an adapter that does something: what is trained, and its wrapper."""
    model = load_model(folder)
    wrapped = add_lora(model, rank=2, alpha=6.0, targets=targets)
    with torch.no_grad():
        for number, (name, weight) in enumerate(wrapped.named_parameters()):
            if "lora_B" in name:
                weight.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(number))
    return model, wrapped


def test_an_adapter_is_merged_in_the_copy_alone(tiny_model: Path, tmp_path: Path) -> None:
    """W + (alpha / rank) B A = W + 3 B A in the copy, whose samples are those of the model with its adapter. That one stays."""
    model, wrapped = adapted(tiny_model)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    options = Elsewhere()
    sampler = Sampler(options, served(tiny_model), tmp_path / "copy")
    drawn = sampler.complete(model, REQUESTS)
    with Policy(model) as policy, torch.no_grad():
        trees = [TokenTree(request.prompt_ids, (made.tokens,)) for request, made in zip(REQUESTS, drawn, strict=True)]
        own = policy(trees).tolist()
    assert [logp for made in drawn for logp in made.logps or ()] == pytest.approx(own, abs=1e-5)
    assert sampler._rounding < 1e-5
    engine = sampler._engine
    assert isinstance(engine, Running)
    name = "model.layers.1.mlp.down_proj"
    down, up = (before[f"{name}.lora_{side}.default.weight"] for side in "AB")
    torch.testing.assert_close(engine.model.state_dict()[f"{name}.weight"], before[f"{name}.base_layer.weight"] + 3 * up @ down)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    merged, plain = merged_weights(model), merge_lora(wrapped).state_dict()
    assert merged is not None and set(merged) == set(plain)
    for name in plain:
        torch.testing.assert_close(merged[name], plain[name])


def test_a_model_without_adapter_has_nothing_to_merge(tiny_model: Path) -> None:
    assert merged_weights(load_model(tiny_model)) is None


def test_an_adapter_of_a_tied_weight_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    """Merged into the LM head it would change the embeddings."""
    model, _ = adapted(tiny_model, "lm_head,q_proj")
    with pytest.raises(UserError, match=r"^lm_head: an adapter on a quantised or tied weight is not merged") as caught:
        Sampler(Elsewhere(), served(tiny_model), tmp_path / "copy").complete(model, REQUESTS)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


SMALL = with_settings(
    load_method("airl-reverse-kl"), {"learning_rate": 1e-3, "batch_size": 4, "max_new_tokens": 8, "log_every": 1}
)


def batches(folder: Path, into: Path, options: Any, steps: int) -> OnPolicySteps:
    """Of a round of airl-reverse-kl on counting up."""
    trees = tuple(Tree(f"d{n}", (30 + n, 40, 50), Branch((60 + n, 61 + n, 4))) for n in range(6))
    company = Company(options, served(folder), folder)
    return company.steps(SMALL, ShuffledSteps(trees, 4, steps, (1, 0)), folder, into, (1, 0))


def train(folder: Path, into: Path, options: Any, steps: int) -> tuple[Any, dict[str, Any]]:
    """The model after that round, and the round's facts."""
    model = load_model(folder)
    return model, loop.train(model, SMALL, loop.Schedule(batches(folder, into, options, steps), None, 1), into)[1]


def test_a_round_leaves_no_engine_behind(tiny_model: Path, tmp_path: Path) -> None:
    """Neither one that ends nor one that fails after a sampling."""
    options = Elsewhere()
    train(tiny_model, tmp_path, options, 3)
    assert options.log == ["start", "reload", "reload", "close"]
    failing = Elsewhere(fails_at=1)
    (tmp_path / "failing").mkdir()
    with pytest.raises(TrainingError, match="step 2: no answer was sampled: out of order"):
        train(tiny_model, tmp_path / "failing", failing, 3)
    assert failing.log == ["start", "reload", "close"]
    assert not [path for path in tmp_path.rglob("*") if "sampled" in path.name]


def test_the_engine_ends_before_the_round_is_written(tiny_model: Path, tmp_path: Path) -> None:
    options = Elsewhere()
    steps = batches(tiny_model, tmp_path, options, 2)
    with Policy(load_model(tiny_model)) as policy:
        following = steps.follow(policy, 0)
        next(following)
        assert options.log == ["start"]
        steps.finish(tmp_path)
        assert options.log == ["start", "close"]
        following.close()  # type: ignore[attr-defined]


@needs_vllm
def test_two_steps_of_training_with_vllm(mini_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One vLLM draws the samples of both steps, and its log-probs are those that training computes, before and after a step."""
    started: list[VllmOptions] = []
    make = VllmOptions.make

    def counted(options: VllmOptions, given: Served) -> VllmEngine:
        started.append(options)
        return make(options, given)

    monkeypatch.setattr(VllmOptions, "make", counted)
    model, facts = train(mini_folder, tmp_path, VllmOptions(), 2)
    old, new = (each.get_input_embeddings().weight.detach() for each in (load_model(mini_folder), model))
    assert float((new - old).abs().max()) > 1e-4  # so the second step's samples are another policy's
    lines = metrics.read_metrics(tmp_path / metrics.FILE)
    assert [line["sampling_gap"] < 1e-3 for line in lines] == [True, True]
    assert facts["sampling_gap"] == max(line["sampling_gap"] for line in lines)
    assert len(started) == 1 and facts["samplings"] == 2
