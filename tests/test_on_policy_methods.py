"""What must hold for every registered method that samples from the policy it trains, and for the source of its batches."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from baselines import METHODS
from gsil_bench.data.chat import ChatFormat
from gsil_bench.errors import UserError
from gsil_bench.generation.engine import Request, Sampling
from gsil_bench.generation.engines import Served
from gsil_bench.generation.transformers_engine import TransformersEngine, TransformersOptions
from gsil_bench.methods import Method, PairLogProbs, TokenLogProbs, load_method, setting_groups, with_settings
from gsil_bench.models import checkpoint
from gsil_bench.models.policy import Policy
from gsil_bench.training import loop, metrics, rollouts
from gsil_bench.training.batches import Branch, ShuffledSteps, Tree
from gsil_bench.training.critics import save_head
from gsil_bench.training.learner import Learner, TrainingError
from gsil_bench.training.rollouts import Company
from gsil_bench.training.sampler import Sampler
from gsil_bench.training.state import FILE as STATE

ON_POLICY = [name for name in METHODS if load_method(name).rollouts is not None]
COUNT, LENGTH = 3, 4


def samples_of(logps: list[float], **more: Tensor) -> TokenLogProbs:
    """Three samples of four tokens with everything that a reward or a loss may read."""
    numbers = torch.tensor(logps).repeat_interleave(LENGTH).requires_grad_()
    pair, position = torch.arange(COUNT).repeat_interleave(LENGTH), torch.arange(LENGTH).repeat(COUNT)
    ones = torch.ones(COUNT * LENGTH)
    given = {
        "sampled_logps": -ones, "reference_logps": -1.1 * ones, "initial_logps": -1.5 * ones, "scores": 0.3 * ones,
        "values": 0.2 * ones, "returns": ones, "advantages": ones, "similarity": 0.5 * ones, "real_length": 3 * ones,
        "finished": ones, **more,
    }  # fmt: skip
    full = torch.full_like(pair, LENGTH)
    return TokenLogProbs(numbers, torch.full_like(numbers, math.nan), pair, position, full, COUNT, LENGTH, given)


def losses_of(method: Method, samples: TokenLogProbs) -> Tensor:
    assert method.loss is not None
    sums = samples.sum(samples.logps)
    nothing = torch.full_like(sums, math.nan)
    pair = PairLogProbs(nothing, sums, nothing, nothing, nothing, nothing, (TokenLogProbs.unknown(nothing), samples))
    return method.loss(pair, **method.settings)


def rewards_of(method: Method, samples: TokenLogProbs) -> Tensor:
    assert method.rollouts is not None
    return method.rollouts.reward(samples, **method.rollouts.settings)


@pytest.mark.parametrize("name", ON_POLICY)
def test_the_record_is_whole_and_json(name: str) -> None:
    method = load_method(name)
    assert method.name == name
    assert method.summary.endswith(".") and method.formula
    assert method.normalise == "generated-tokens"
    record = json.loads(json.dumps(method.describe()))
    assert record["rollouts"]["reward"] == method.rollouts.reward.__qualname__  # type: ignore[union-attr]
    assert all(len(set(group)) == len(group) for group in setting_groups(method).values())


@pytest.mark.parametrize("name", ON_POLICY)
def test_a_reward_is_a_finite_number_for_each_token(name: str) -> None:
    samples = samples_of([-1.0, -2.0, -0.5])
    rewards = rewards_of(load_method(name), samples)
    assert rewards.shape == samples.logps.shape
    assert bool(rewards.isfinite().all())


@pytest.mark.parametrize("name", ON_POLICY)
def test_a_reward_does_not_depend_on_other_samples(name: str) -> None:
    """The last two samples change in everything that can be read; the first one's rewards stay."""
    method, others = load_method(name), torch.arange(COUNT * LENGTH) >= LENGTH
    given = samples_of([-1.0, -2.0, -0.5])
    changed = {key: torch.where(others, 2 * values + 0.7, values) for key, values in given.more.items()}
    one, other = rewards_of(method, given), rewards_of(method, dataclasses.replace(given, more=changed))
    assert torch.equal(one[:LENGTH], other[:LENGTH])
    assert not torch.equal(one, other)


@hypothesis_settings(max_examples=100, deadline=None)
@given(
    name=st.sampled_from(ON_POLICY),
    advantage=st.floats(-100, 100, width=32),
    ratio=st.floats(-5, 5, width=32),
)
def test_a_loss_never_pulls_the_wrong_way(name: str, advantage: float, ratio: float) -> None:
    """A token that was better than expected is never made less likely, a worse one never more likely; clipped, it is left."""
    ones = torch.ones(COUNT * LENGTH)
    samples = samples_of([ratio - 1.0] * COUNT, advantages=advantage * ones)
    losses = losses_of(load_method(name), samples)
    (gradient,) = torch.autograd.grad(losses.sum(), samples.logps)
    assert losses.shape == (COUNT,) and bool(losses.isfinite().all())
    assert bool((gradient * math.copysign(1.0, advantage) <= 0).all())


# The source of batches.


def demonstrations(folder: Path, count: int = 8) -> list[Tree]:
    chat = ChatFormat.of(checkpoint.load_tokenizer(folder), None, checkpoint.end_token_ids(folder))
    ids = [tuple(chat.tokens(f"What is {n} plus {n}?")) for n in range(count)]
    return [
        Tree(f"d{n}", prompt, Branch((*ids[(n + 1) % count][: 3 + n % 3], chat.end_token_ids[0]))) for n, prompt in enumerate(ids)
    ]


def served(folder: Path) -> Served:
    chat = ChatFormat.of(checkpoint.load_tokenizer(folder), None, checkpoint.end_token_ids(folder))

    def load() -> object:
        raise AssertionError("the policy in training is to be sampled")

    return Served(
        folder, load, chat.end_token_ids, 256, chat.decode, "cpu", "fp32", False, chat.tokens, chat.spell  # type: ignore[arg-type]
    )  # fmt: skip


def small(name: str, **changes: object) -> Method:
    return with_settings(
        load_method(name), {"learning_rate": 1e-3, "batch_size": 4, "max_new_tokens": 8, "log_every": 1, **changes}
    )


@pytest.fixture(scope="session")
def critic_folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model whose head is not zero, and another model than the policy."""
    folder = tmp_path_factory.mktemp("critic")
    model = checkpoint.load_model(tiny_model)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.1)
    policy = Policy(model, scalar=True)
    assert policy.scalar is not None
    torch.nn.init.normal_(policy.scalar.weight, generator=torch.Generator().manual_seed(3))
    policy.restore()
    policy.model.save_pretrained(folder)
    save_head(policy, folder)
    return folder


def schedule(method: Method, folder: Path, critic: Path, into: Path, steps: int) -> loop.Schedule:
    assert method.rollouts is not None
    before = method.rollouts.critic is not None and not method.rollouts.critic.alongside
    needs_initial = bool(method.rollouts.needs & {"initial", "similarity"})
    company = Company(
        TransformersOptions(), served(folder), folder, critic if needs_initial else None, critic if before else None
    )
    prompts = ShuffledSteps(demonstrations(folder), 4, steps, (1, 0))
    return loop.Schedule(company.steps(method, prompts, folder, into, (1, 0)), None, 1)


def weights(model: torch.nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("name", ON_POLICY)
def test_a_stopped_run_resumes_bit_for_bit(tiny_model: Path, critic_folder: Path, tmp_path: Path, name: str) -> None:
    """Stopped in the middle of the steps that share samples: samples, advantages and the discriminator are as they were."""
    method, folders = small(name), [tmp_path / part for part in ("whole", "stopped")]
    if method.rollouts and method.rollouts.updates == 1:
        method = with_settings(method, {"updates": 2})
    for folder in folders:
        folder.mkdir()
    whole = checkpoint.load_model(tiny_model)
    loop.train(whole, method, schedule(method, tiny_model, critic_folder, folders[0], 6), folders[0])
    done: list[int] = []

    def stop(steps: int) -> None:
        done.append(steps)
        if sum(done) == 3:
            raise KeyboardInterrupt

    given = schedule(method, tiny_model, critic_folder, folders[1], 6)
    with pytest.raises(KeyboardInterrupt):
        loop.train(checkpoint.load_model(tiny_model), method, given, folders[1], loop.Surroundings(stop))
    resumed = checkpoint.load_model(tiny_model)
    _, facts = loop.train(resumed, method, schedule(method, tiny_model, critic_folder, folders[1], 6), folders[1])
    assert not torch.equal(weights(checkpoint.load_model(tiny_model)), weights(whole))
    assert torch.equal(weights(whole), weights(resumed))
    assert (folders[0] / metrics.FILE).read_text() == (folders[1] / metrics.FILE).read_text()
    assert facts["steps"] == 6
    assert facts["sampling_gap"] < 1e-3


@pytest.mark.parametrize("name", ON_POLICY)
def test_micro_batches_do_not_change_a_step(tiny_model: Path, critic_folder: Path, tmp_path: Path, name: str) -> None:
    """Two steps on different samples: a discriminator's first scores are 0, and teach nothing."""
    lines = []
    for folder, changes in ((tmp_path / "one", {}), (tmp_path / "many", {"micro_batch_trees": 1})):
        folder.mkdir()
        method = small(name, updates=1, **changes)
        if method.rollouts and method.rollouts.critic and method.rollouts.critic.alongside:
            method = with_settings(method, {"critic_learning_rate": 1e-2})
        loop.train(checkpoint.load_model(tiny_model), method, schedule(method, tiny_model, critic_folder, folder, 2), folder)
        lines.append(metrics.read_metrics(folder / metrics.FILE)[1])
    assert lines[0]["grad_norm"] > 1e-3
    for key in ("reward", "grad_norm", *(["discriminator_loss"] if "discriminator_loss" in lines[0] else [])):
        assert lines[0][key] == pytest.approx(lines[1][key], rel=1e-3, abs=1e-6), key


def test_the_loss_of_a_step_is_a_mean_over_the_samples_tokens(tiny_model: Path, tmp_path: Path) -> None:
    """Two prompts with two samples each of 2 and 4, 3 and 1 tokens, ratios 1, advantages 1 and 5, 2 and −3 at each token: the
    clipped loss is −Σ advantages / 10 tokens = −(2·1 + 4·5 + 3·2 − 1·3)/10 = −2.5.
    """
    model = checkpoint.load_model(tiny_model)
    with Policy(model) as policy:
        trees = []
        for name, sides in (("a", [((7, 8), 1.0), ((9, 10, 11, 12), 5.0)]), ("b", [((5, 6, 7), 2.0), ((8,), -3.0)])):
            bare = Tree(name, (20, 21), Branch(()), tuple(Branch(ids) for ids, _ in sides))
            logps = policy([bare.tokens]).detach().split([len(ids) for ids, _ in sides])
            branches = [
                Branch(ids, of_tokens={"sampled_logps": tuple(own.tolist()), "advantages": (advantage,) * len(ids)})
                for (ids, advantage), own in zip(sides, logps, strict=True)
            ]
            trees.append(dataclasses.replace(bare, generated=tuple(branches)))
    learner = Learner(model, small("airl-reverse-kl"))
    line, finite = learner.update(trees, 0, 1e-4)
    assert finite
    assert float(line["loss"]) == pytest.approx(-2.5, abs=1e-5)


def test_samples_are_those_of_the_engine_at_their_step(tiny_model: Path, critic_folder: Path, tmp_path: Path) -> None:
    """The first batch of a round is what the engine draws from the starting weights; the next one has other seeds."""
    method = small("airl-reverse-kl")
    steps = schedule(method, tiny_model, critic_folder, tmp_path, 2).steps
    assert isinstance(steps, rollouts.OnPolicySteps)
    with Policy(checkpoint.load_model(tiny_model)) as policy:
        batches = list(steps.follow(policy, 0))  # the weights stay: nobody trains
        engine = TransformersEngine(
            checkpoint.load_model(tiny_model), served(tiny_model).end_token_ids, 256, served(tiny_model).decode
        )
        for step, trees in enumerate(batches):
            sampling = Sampling(8, 1.0, seed=2 * rollouts.SEEDS_OF_RUN + step)
            requests = [Request(tree.prompt_ids, sampling, sample, True) for tree in trees for sample in range(4)]
            drawn = dict(engine.complete(requests))
            got = [branch.completion_ids for tree in trees for branch in tree.generated]
            assert got == [drawn[n].tokens for n in range(len(requests))]
            for n, branch in enumerate(branch for tree in trees for branch in tree.generated):
                assert branch.of_tokens["sampled_logps"] == pytest.approx(drawn[n].logps, abs=1e-4)
                assert branch.of_tokens["reference_logps"] == pytest.approx(drawn[n].logps, abs=1e-4)


def test_demonstrations_of_one_prompt_are_sampled_apart(tiny_model: Path, critic_folder: Path, tmp_path: Path) -> None:
    """Two demonstrations of a prompt in one batch: eight samples that are drawn with eight seeds, not four of them twice."""
    method = small("airl-reverse-kl")
    one, *others = demonstrations(tiny_model)
    trees = [one, dataclasses.replace(one, id="twin"), *others]
    steps = schedule(method, tiny_model, critic_folder, tmp_path, 1).steps
    assert isinstance(steps, rollouts.OnPolicySteps)
    requests = steps._requests(trees[:3], 0)
    assert len({request.seed for request in requests}) == len(requests) == 12
    assert [request.prompt_ids for request in requests[:8]] == [one.prompt_ids] * 8


def test_steps_share_samples_as_often_as_updates_says(tiny_model: Path, critic_folder: Path, tmp_path: Path) -> None:
    method = small("airl-reverse-kl", updates=2)
    steps = schedule(method, tiny_model, critic_folder, tmp_path, 5).steps
    assert isinstance(steps, rollouts.OnPolicySteps)
    with Policy(checkpoint.load_model(tiny_model)) as policy:
        batches = list(steps.follow(policy, 0))
    assert [batches[n] is batches[n + 1] for n in range(4)] == [True, False, True, False]
    assert steps.finish(tmp_path)["samplings"] == 3


def test_an_engine_elsewhere_is_given_the_weights_as_they_are(tiny_model: Path, critic_folder: Path, tmp_path: Path) -> None:
    """An engine that loads checkpoints from disk: started at every sampling on a copy of the newest weights, then closed."""
    seen: list[Tensor] = []
    closed: list[bool] = []

    class FromDisk(TransformersOptions):
        in_process = False  # type: ignore[misc]

        def make(self, given: Served) -> TransformersEngine:
            model = checkpoint.load_model(given.folder)
            seen.append(weights(model))
            engine = super().make(dataclasses.replace(given, load=lambda: model))
            engine.close = lambda: closed.append(True)  # type: ignore[method-assign]
            return engine

    model = checkpoint.load_model(tiny_model)
    (tmp_path / "copy").mkdir()
    sampler = Sampler(FromDisk(), served(tiny_model), tmp_path / "copy")
    request = Request((20, 21, 22), Sampling(4, 1.0, seed=5), 0, True)
    sampler.complete(model, [request])
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    (second,) = sampler.complete(model, [request])
    assert torch.equal(seen[1], weights(model)) and not torch.equal(seen[0], seen[1])
    assert closed == [True, True]
    assert second.tokens == Sampler(TransformersOptions(), served(tiny_model), tmp_path).complete(model, [request])[0].tokens


def test_an_engine_that_computes_another_policy_is_found(
    tiny_model: Path, critic_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine's log-probs are 0.01 nats off: training stops, and the state is kept."""
    draw = Sampler.complete

    def shifted(self: Sampler, model: object, requests: object) -> object:
        return [
            dataclasses.replace(found, logps=(found.logps[0] - 0.01, *found.logps[1:]))  # type: ignore[index]
            for found in draw(self, model, requests)  # type: ignore[arg-type]
        ]

    monkeypatch.setattr(Sampler, "complete", shifted)
    method = small("airl-reverse-kl")
    with pytest.raises(TrainingError, match=r"step 1: a sample's log-prob differs by 0\.01 nats between the engine"):
        loop.train(checkpoint.load_model(tiny_model), method, schedule(method, tiny_model, critic_folder, tmp_path, 2), tmp_path)
    assert (tmp_path / STATE).exists()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("samples", 1, "2 at least"),
        ("baseline", "mean", "Known: group, leave-one-out, none, value"),
        ("baseline", "value", "a loss that trains the value head"),
        ("temperature", 0.7, "must be 1"),
        ("mix_rounds", 2, "must be 1, it learns from its newest samples only"),
        ("kl", -1, "0 or more"),
        ("updates", 0, "at least 1"),
        ("discount", 0, "above 0"),
        ("gae_lambda", 2, "between 0 and 1"),
        ("score_clip", -1, "0 .none. or more"),
        ("kl_limit", 0, "above 0"),
        ("critic_learning_rate", -1, "out of range"),
        ("critic_updates", 0, "at least 1"),
        ("critic_learning_rat", 1, "did you mean 'critic_learning_rate'"),
        ("start_share", 1, "between 0 and 1"),
        ("likelihood_temperature", 0.5, "must be 1, it samples itself"),
        ("embedding_noise", 5, "must be 0, it samples itself"),
        ("clip", -1, "clip must be above 0"),
        ("critic_epochs", 3, "unknown setting"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(key: str, value: object, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        with_settings(load_method("airl-reverse-kl"), {key: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["afd-closed-form", "dense-path-reinforce"])
def test_a_start_that_changes_with_the_rounds_is_refused_where_a_reward_is_made_of_it(name: str) -> None:
    with_settings(load_method(name), {"rounds": 2})
    with pytest.raises(UserError, match="opponent=previous: must be initial with several rounds"):
        with_settings(load_method(name), {"opponent": "previous", "rounds": 2})


@pytest.mark.parametrize("name", ["afd-closed-form", "afd-init-sft", "dense-path-reinforce"])
def test_a_reward_that_compares_the_start_with_itself_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="its reward compares where it starts with the model as given"):
        with_settings(load_method(name), {"starts_from": ""})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positives": "samples"}, "positives of the critic of method 'mine' 'samples'"),
        ({"negatives": "demonstrations"}, "negatives of the critic of method 'mine' 'demonstrations'"),
    ],
)
def test_a_critic_of_ones_own_that_cannot_be(changes: dict[str, str], message: str) -> None:
    given = load_method("afd-sft-demo")
    assert given.rollouts is not None and given.rollouts.critic is not None
    critic = dataclasses.replace(given.rollouts.critic, **changes)  # type: ignore[arg-type]
    mine = dataclasses.replace(given, name="mine", rollouts=dataclasses.replace(given.rollouts, critic=critic))
    with pytest.raises(UserError, match=message):
        with_settings(mine, {"kl": 0.1})
    misspelt = dataclasses.replace(given.rollouts, needs=frozenset({"scores", "similarities"}))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="did you mean 'similarity'"):
        with_settings(dataclasses.replace(mine, rollouts=misspelt), {"kl": 0.1})


def test_demonstrations_matched_to_pairs_are_no_samples() -> None:
    with pytest.raises(UserError, match="batches must be 'pairs'"):
        with_settings(dataclasses.replace(load_method("rlsr"), batches="matched-demonstrations"), {"kl": 0.1})


def _first_token(samples: TokenLogProbs) -> Tensor:
    return samples.ids.double()


def _a_list(samples: TokenLogProbs) -> list[float]:
    return [0.0]


def test_a_reward_may_read_the_tokens(tiny_model: Path, critic_folder: Path, tmp_path: Path) -> None:
    given = small("dense-path-reinforce", baseline="none", kl=0, discount=1)
    assert given.rollouts is not None
    method = dataclasses.replace(given, rollouts=dataclasses.replace(given.rollouts, reward=_first_token, settings={}))
    steps = schedule(method, tiny_model, critic_folder, tmp_path, 1).steps
    assert isinstance(steps, rollouts.OnPolicySteps)
    with Policy(checkpoint.load_model(tiny_model)) as policy:
        (trees,) = steps.follow(policy, 0)
    for branch in (branch for tree in trees for branch in tree.generated):
        assert branch.of_tokens["advantages"][-1] == branch.completion_ids[-1]
        assert branch.of_tokens["advantages"][0] == sum(branch.completion_ids)
    wrong = dataclasses.replace(given, rollouts=dataclasses.replace(given.rollouts, reward=_a_list, settings={}))
    with pytest.raises(TrainingError, match=r"the reward returned list for \d+ tokens, not a number for each"):
        loop.train(checkpoint.load_model(tiny_model), wrong, schedule(wrong, tiny_model, critic_folder, tmp_path, 1), tmp_path)


def _likelihood(pair: PairLogProbs) -> Tensor:
    return -pair.policy_real_logps


def test_a_loss_that_reads_demonstrations_is_told_that_there_are_none(
    tiny_model: Path, critic_folder: Path, tmp_path: Path
) -> None:
    method = dataclasses.replace(small("rlsr"), loss=_likelihood, settings={})
    with pytest.raises(TrainingError, match="is something missing"):
        loop.train(checkpoint.load_model(tiny_model), method, schedule(method, tiny_model, critic_folder, tmp_path, 1), tmp_path)


def test_settings_reach_rollouts_reward_and_critic() -> None:
    changed = with_settings(load_method("airl-reverse-kl"), {"kl": "0.2", "critic_learning_rate": "3e-5", "critic_updates": "2"})
    assert changed.rollouts is not None and changed.rollouts.critic is not None
    assert changed.rollouts.kl == 0.2
    assert changed.rollouts.critic.training["learning_rate"] == 3e-5
    assert changed.rollouts.critic.updates == 2
    assert changed.decides() != load_method("airl-reverse-kl").decides()


def test_leaving_the_reference_costs_kl_times_the_log_ratio(tiny_model: Path, critic_folder: Path, tmp_path: Path) -> None:
    """Another model as reference, no baseline: advantages less those at kl=0 are −kl Σ_{s ≥ t} (log π − log π_ref), kl = ½."""
    found = {}
    for kl in (0.0, 0.5):
        method = small("rlsr", baseline="none", kl=kl)
        prompts = ShuffledSteps(demonstrations(tiny_model), 4, 1, (1, 0))
        company = Company(TransformersOptions(), served(tiny_model), critic_folder, critic_folder)
        with Policy(checkpoint.load_model(tiny_model)) as policy:
            (trees,) = company.steps(method, prompts, tiny_model, tmp_path, (1, 0)).follow(policy, 0)
        found[kl] = [branch for tree in trees for branch in tree.generated]
    for free, held in zip(found[0.0], found[0.5], strict=True):
        ratios = [
            one - other for one, other in zip(held.of_tokens["sampled_logps"], held.of_tokens["reference_logps"], strict=True)
        ]
        paid = [-0.5 * sum(ratios[start:]) for start in range(len(ratios))]
        change = [one - other for one, other in zip(held.of_tokens["advantages"], free.of_tokens["advantages"], strict=True)]
        assert change == pytest.approx(paid, abs=1e-4)
        assert max(map(abs, paid)) > 1e-3


def test_a_value_head_goes_on_where_the_round_before_left_it(tiny_model: Path, critic_folder: Path, tmp_path: Path) -> None:
    """The first loss of a round whose start has a scalar head is another one than with a head of zeros."""
    losses = []
    for start in (None, critic_folder):
        folder = tmp_path / str(start is None)
        folder.mkdir()
        method = small("last-mile-rl")
        given = schedule(method, tiny_model, critic_folder, folder, 1)
        given = dataclasses.replace(given, start=start)
        loop.train(checkpoint.load_model(tiny_model), method, given, folder)
        losses.append(metrics.read_metrics(folder / metrics.FILE)[0]["loss"])
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
