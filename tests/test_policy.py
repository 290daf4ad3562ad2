"""Every layout gives the log-probs and the gradients of one plain forward pass a sequence, on six families of models."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from gsil_bench.errors import UserError
from gsil_bench.generation.decoder import OneAtATime
from gsil_bench.generation.slots import Piece
from gsil_bench.models import attention, policy
from gsil_bench.models.attention import CannotShareError
from gsil_bench.models.noise import EmbeddingNoise
from gsil_bench.models.packing import LAYOUTS, TokenTree
from gsil_bench.models.policy import Policy

VOCABULARY = 200
LLAMA_LIKE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
WINDOWED = {**LLAMA_LIKE, "sliding_window": 16, "head_dim": 8}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA_LIKE, tie_word_embeddings=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**LLAMA_LIKE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**LLAMA_LIKE, head_dim=8)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**WINDOWED)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**WINDOWED)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**WINDOWED)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128)),
}


def make(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = MODELS[name]().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)  # far from uniform, so that a wrong mask or position shows
    return model


def forest(k: int) -> list[TokenTree]:
    """Trees of very different lengths, longer than the sliding windows above; one completion has a single token."""
    random = torch.Generator().manual_seed(k)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(1, VOCABULARY, (length,), generator=random).tolist())

    return [TokenTree(ids(prompt), tuple(ids(1 + (7 * n * prompt) % 31) for n in range(k + 1))) for prompt in (1, 9, 24, 40)]


def plain(model: PreTrainedModel, trees: list[TokenTree]) -> torch.Tensor:
    """log_softmax of every sequence's own forward pass, as transformers has it."""
    rows = []
    for tree in trees:
        for completion in tree.completions:
            logits = model(input_ids=torch.tensor([[*tree.prompt_ids, *completion]]), use_cache=False).logits[0]
            logps = torch.log_softmax(logits.float() if logits.dtype == torch.bfloat16 else logits, -1)
            start = len(tree.prompt_ids) - 1
            rows.append(logps[torch.arange(start, start + len(completion)), torch.tensor(completion)])
    return torch.cat(rows)


def gradients(model: PreTrainedModel, logps: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a weighted sum of the log-probs: the weights have both signs, as in a pairwise loss."""
    model.zero_grad()
    (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_log_probs_and_gradients_equal_the_plain_forward(name: str, layout: str, k: int) -> None:
    """fp32: log-probs to 1e-5, every parameter's gradient to 1e-5 of its norm."""
    model, trees = make(name), forest(k)
    expected = plain(model, trees)
    wanted = gradients(model, expected)
    used = Policy(model, layout)
    assert used.layout == layout and not used.notes
    logps = used(trees)
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-5)
    got = gradients(model, logps)
    assert got.keys() == wanted.keys()
    for parameter, gradient in wanted.items():
        assert float((got[parameter] - gradient).norm()) <= 1e-5 * float(gradient.norm()), parameter


@pytest.mark.parametrize("name", MODELS)
def test_layouts_are_exact_in_fp64(name: str) -> None:
    """But for Gemma 2, whose soft-capped attention is softmaxed in fp32 by transformers and here."""
    model, trees = make(name).double(), forest(2)
    expected = plain(model, trees)
    for layout in LAYOUTS:
        with Policy(model, layout) as used:
            torch.testing.assert_close(used(trees), expected, rtol=0, atol=1e-6 if name == "gemma2" else 1e-11)


@pytest.mark.parametrize("name", MODELS)
def test_recomputed_activations_give_the_same_gradients(name: str) -> None:
    model, trees = make(name), forest(2)
    used = Policy(model, "shared")
    kept = gradients(model, used(trees))
    used.recompute_activations()
    again = gradients(model, used(trees))
    assert all(torch.equal(kept[parameter], again[parameter]) for parameter in kept)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_model_that_recomputes_is_lent_with_its_cache(name: str) -> None:
    """Layers that recompute drop the cache: an engine would go on from the last token alone. Lent, they do not recompute."""
    model, tokens = make(name), [5, 9, 11, 3]
    expected = OneAtATime(model, False).alone(tokens)
    used = Policy(model, "shared")
    used.recompute_activations()
    kept = gradients(model, used(forest(2)))
    with used.lent() as lent:
        decoder = OneAtATime(lent, False)
        decoder.fill([Piece(tuple(tokens[:3]))])
        torch.testing.assert_close(decoder.step(tokens[3:], [3]), expected, rtol=0, atol=1e-5)
    recomputed = [module.training for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert recomputed and all(recomputed)
    again = gradients(model, used(forest(2)))
    assert all(torch.equal(kept[parameter], again[parameter]) for parameter in kept)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_bf16_differs_no_more_from_padding_than_padding_from_itself(name: str) -> None:
    """Sums over a completion: shared against padded, beside padded against one sequence at a time."""
    model, trees = make(name).bfloat16(), forest(2)
    with torch.no_grad(), Policy(model, "padded") as used:
        padded = used(trees)
        alone = torch.cat([used([single]) for tree in trees for single in tree.unshared()])
    with torch.no_grad(), Policy(model, "shared") as used:
        shared, exact = used(trees), plain(make(name), trees)
    noise, difference = (float((other - padded).abs().mean()) for other in (alone, shared))
    assert difference <= 3 * noise + 0.01
    assert float((shared - exact).abs().mean()) <= 1.5 * float((padded - exact).abs().mean()) + 0.01


def test_the_fastest_layout_is_taken_and_the_model_gets_its_attention_back() -> None:
    model = make("llama")
    before = model.config._attn_implementation
    with Policy(model) as used:
        assert used.layout == "shared"
        assert model.config._attn_implementation == attention.NAME
    assert model.config._attn_implementation == before
    assert used(forest(1)).shape == plain(model, forest(1)).shape


def test_a_model_serves_one_policy_at_a_time() -> None:
    model = make("llama")
    used = Policy(model)
    with pytest.raises(RuntimeError, match="another Policy"):
        Policy(model)
    used.restore()
    Policy(model).restore()


def test_a_model_that_cannot_share_falls_back_loudly(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2)).eval()
    trees = forest(2)
    with caplog.at_level(logging.WARNING), Policy(model) as used:
        assert used.layout == "padded"
        torch.testing.assert_close(used(trees), plain(model, trees), rtol=0, atol=1e-5)
    assert "layout shared" in caplog.text and "layout packed" in caplog.text
    assert used.notes
    with pytest.raises(CannotShareError, match="layout shared is not possible"):
        Policy(model, "shared")


def test_a_wrong_mask_is_found(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Completions that see one another: sharing is refused, packing without sharing is taken."""
    honest = attention._by_segments

    def leaking(module, query, key, value, segments, *others):  # type: ignore[no-untyped-def]
        if any(len(branches) > 1 for _, branches in segments.trees):
            return torch.nn.functional.scaled_dot_product_attention(
                query, *(tensor.repeat_interleave(query.shape[1] // key.shape[1], 1) for tensor in (key, value)), is_causal=True
            ).transpose(1, 2)
        return honest(module, query, key, value, segments, *others)

    monkeypatch.setattr(attention, "_by_segments", leaking)
    with caplog.at_level(logging.WARNING), Policy(make("llama")) as used:
        assert used.layout == "packed"
    assert "from plain padding" in caplog.text


def test_attention_that_is_not_known_is_refused() -> None:
    nothing = torch.zeros(1, 1, 1, 1)
    with pytest.raises(CannotShareError, match="s_aux"):
        attention.tree_attention(torch.nn.Identity(), nothing, nothing, nothing, None, s_aux=nothing)


def test_an_unknown_layout_is_named() -> None:
    with pytest.raises(UserError, match="did you mean 'shared'"):
        Policy(make("llama"), "share")


def test_dropout_is_silent_wherever_a_model_keeps_it() -> None:
    config = GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=1, attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    model = policy.silence_dropout(GPT2LMHeadModel(config))
    model.train()
    ids = torch.arange(10)[None]
    assert torch.equal(model(ids).logits, model(ids).logits)
    llama = policy.silence_dropout(LlamaForCausalLM(LlamaConfig(**LLAMA_LIKE, attention_dropout=0.5))).train()
    assert torch.equal(llama(ids).logits, llama(ids).logits)


def test_a_window_that_does_not_reach_attention_is_noticed(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model whose layers put their window into the mask alone would see everything over trees; short probes would not tell."""
    model = make("mistral")
    model.config.sliding_window = 4000
    honest = attention.tree_attention
    monkeypatch.setattr(attention, "tree_attention", lambda *args, sliding_window=None, **named: honest(*args, **named))
    with caplog.at_level(logging.WARNING), Policy(model) as used:
        assert used.layout == "padded"
    assert "a window that it keeps to itself" in caplog.text


def logits_of(
    model: PreTrainedModel, tree: TokenTree, completion: tuple[int, ...], noise: torch.Tensor | None = None
) -> torch.Tensor:
    """The logits that the completion's tokens are predicted from, of one sequence's own forward pass."""
    ids = torch.tensor([[*tree.prompt_ids, *completion]])
    inputs = {"input_ids": ids}
    if noise is not None:
        inputs = {"inputs_embeds": model.get_input_embeddings()(ids) + torch.nn.functional.pad(noise, (0, 0, 0, 1))}
    logits: torch.Tensor = model(**inputs, use_cache=False).logits[0, len(tree.prompt_ids) - 1 : -1]
    return logits


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_normalisers_and_temperature_in_every_layout(name: str, layout: str) -> None:
    """log Σ exp and log softmax of z / 0.7, from each sequence's own logits."""
    model, trees = make(name), forest(2)
    rows = [(tree, completion) for tree in trees for completion in tree.completions]
    with torch.no_grad():
        wanted = [logits_of(model, tree, completion) / 0.7 for tree, completion in rows]
        with Policy(model, layout, temperature=0.7) as used:
            logps, normalisers = used(trees, ("logps", "normalisers"))
            assert torch.equal(used(trees), logps)
    torch.testing.assert_close(normalisers, torch.cat([z.logsumexp(1) for z in wanted]), rtol=0, atol=2e-5)
    exact = [z.log_softmax(1)[torch.arange(len(c)), torch.tensor(c)] for z, (_, c) in zip(wanted, rows, strict=True)]
    torch.testing.assert_close(logps, torch.cat(exact), rtol=0, atol=2e-5)


def test_normalisers_of_a_head_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    model, trees = make("llama"), forest(1)
    with torch.no_grad(), Policy(model, temperature=0.5) as used:
        known = used(trees, ("logps", "normalisers"))
        used.head_note = "unknown"
        torch.testing.assert_close(used(trees, ("logps", "normalisers")), known, rtol=0, atol=1e-5)
        torch.testing.assert_close(used(trees), known[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_noise_reaches_every_token_alike_in_every_layout(name: str, layout: str, k: int) -> None:
    """Prompt, then each completion's inputs: the prompt's noise is one for all completions of a tree."""
    model, trees = make(name).double(), forest(k)
    noise = EmbeddingNoise(5.0, 1, 2, tuple(f"t{n}" for n in range(len(trees))))
    rows, plainly = [], []
    with torch.no_grad():
        for number, tree in enumerate(trees):
            drawn = noise.of_tree(number, tree, 32, torch.device("cpu")).double()
            counts = [len(tree.prompt_ids), *(len(completion) - 1 for completion in tree.completions)]
            prompt, *parts = drawn.split(counts)
            for completion, part in zip(tree.completions, parts, strict=True):
                for kept, added in ((rows, torch.cat((prompt, part))), (plainly, None)):
                    z = logits_of(model, tree, completion, added)
                    kept.append(z.log_softmax(1)[torch.arange(len(completion)), torch.tensor(completion)])
        with Policy(model, layout) as used:
            noisy = used(trees, noise=noise)
            torch.testing.assert_close(noisy, torch.cat(rows), rtol=0, atol=1e-10)
            assert (noisy - torch.cat(plainly)).abs().max() > 0.01
            torch.testing.assert_close(used(trees), torch.cat(plainly), rtol=0, atol=1e-10)  # and none is left behind


def test_the_size_of_the_noise() -> None:
    """Uniform within ± alpha / √(L d): L = 40 + 60 and 40 + 10 tokens, d = 400, alpha 8: ± 0.04 and ± 0.0566; variance a²/3."""
    tree = TokenTree((1,) * 40, ((2,) * 60, (3,) * 10))
    drawn = EmbeddingNoise(8.0, 0, 0, ("t",)).of_tree(0, tree, 400, torch.device("cpu"))
    assert drawn.shape == (40 + 59 + 9, 400)
    for part, most in ((drawn[:99], 0.04), (drawn[99:], 8 / (50 * 400) ** 0.5)):
        assert float(part.abs().max()) <= most
        assert float(part.abs().max()) > 0.99 * most
        assert float(part.var()) == pytest.approx(most**2 / 3, rel=0.05)
        assert abs(float(part.mean())) < most / 20


def test_noise_depends_on_seed_step_and_tree_only() -> None:
    tree = TokenTree((1, 2), ((3, 4),))

    def drawn(seed: int, step: int, *names: str) -> torch.Tensor:
        return EmbeddingNoise(1.0, seed, step, names).of_tree(len(names) - 1, tree, 8, torch.device("cpu"))

    first = drawn(0, 0, "a")
    torch.rand(7)  # the global generator has no say
    assert torch.equal(first, drawn(0, 0, "a")) and torch.equal(first, drawn(0, 0, "b", "a"))
    assert not any(torch.equal(first, other) for other in (drawn(1, 0, "a"), drawn(0, 1, "a"), drawn(0, 0, "b")))
