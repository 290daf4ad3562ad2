"""The head on scored positions: values and gradients against log_softmax in fp64, memory, families of models, kernels."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from gsil_bench.models import head as head_module
from gsil_bench.models.head import (
    Head,
    Kernel,
    UnknownHeadError,
    backbone,
    check_head,
    choose_kernel,
    logps_and_normalisers,
    scored_logps,
    tiled_logps,
)

TILES = [(3, 5), (7, 100), (100, 7), (1, 1), (4, 11), (1024, 8192)]
HEADS = [(False, 1.0, None), (True, 1.0, None), (True, 0.3, None), (False, 0.5, 2.0), (True, 2.5, 3.0)]
"""Whether it has a bias, scale, softcap."""


@pytest.fixture
def tile(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    return lambda rows, columns: monkeypatch.setitem(head_module.TILES, "cpu", (rows, columns))


def operands(
    positions: int, hidden: int, vocabulary: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, bias and targets."""
    random = torch.Generator().manual_seed(0)
    shapes = (positions, hidden), (vocabulary, hidden), (vocabulary,)
    states, weight, bias = (torch.randn(shape, generator=random).to(dtype).requires_grad_() for shape in shapes)
    return states, weight, bias, torch.randint(vocabulary, (positions,), generator=random)


def plain(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    """The definition, on whole logits."""
    z = head.scale * nn.functional.linear(hidden, head.weight, head.bias)
    z = z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
    return z.log_softmax(1).gather(1, targets[:, None]).squeeze(1)


# Values and gradients.


@pytest.mark.parametrize("size", TILES, ids=str)
@pytest.mark.parametrize(("biased", "scale", "softcap"), HEADS)
def test_values_and_gradients_are_those_of_log_softmax(
    tile: Callable[[int, int], None], size: tuple[int, int], biased: bool, scale: float, softcap: float | None
) -> None:
    tile(*size)
    hidden, weight, bias, targets = operands(8, 6, 11)
    leaves = (hidden, weight, bias) if biased else (hidden, weight)

    def logps(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return scored_logps(hidden, Head(weight, bias, scale, softcap), targets)

    wanted = plain(hidden, Head(*leaves[1:2], bias if biased else None, scale, softcap), targets)
    torch.testing.assert_close(logps(*leaves), wanted, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(logps, leaves)


def test_two_tokens_by_hand() -> None:
    """h = (1, 2), W = ((1, 0), (0, 1)), target 0: z = (1, 2), log π = 1 − log(e + e²) = −log(1 + e), p = (1, e) / (1 + e).

    d log π / dz = onehot − p = (e, −e) / (1 + e), which is also the gradient of h as W is the identity; that of W is its outer
    product with h.
    """
    hidden, weight = torch.tensor([[1.0, 2.0]], requires_grad=True), torch.eye(2).requires_grad_()
    logps = scored_logps(hidden, Head(weight, None), torch.tensor([0]))
    logps.sum().backward()
    share = math.e / (1 + math.e)
    assert logps.item() == pytest.approx(-math.log(1 + math.e))
    torch.testing.assert_close(hidden.grad, torch.tensor([[share, -share]]))
    torch.testing.assert_close(weight.grad, torch.tensor([[share, 2 * share], [-share, -2 * share]]))


def test_an_empty_batch_has_no_log_probs_and_gradients_of_zero() -> None:
    hidden, weight, bias, targets = operands(0, 6, 11, torch.float32)
    logps = scored_logps(hidden, Head(weight, bias), targets, kernel=_never)
    logps.sum().backward()
    assert logps.shape == (0,)
    assert hidden.grad is not None and hidden.grad.shape == (0, 6)
    assert weight.grad is not None and not weight.grad.any()
    assert bias.grad is not None and not bias.grad.any()


def _never(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    raise AssertionError("kernels are not called with nothing")


def test_a_target_outside_the_vocabulary_gives_nan() -> None:
    hidden, weight, bias, _ = operands(4, 6, 11)
    logps = scored_logps(hidden, Head(weight, bias), torch.tensor([0, 11, -100, 10]))
    assert logps.isnan().tolist() == [False, True, True, False]


@pytest.mark.parametrize("size", [(4, 3), (1024, 8192)])
def test_entries_that_a_bias_forbids(tile: Callable[[int, int], None], size: tuple[int, int]) -> None:
    tile(*size)
    hidden, weight, bias, targets = operands(8, 6, 11)
    forbidden = bias.detach().clone()
    forbidden[:5] = -torch.inf
    targets = targets.clamp(min=5)
    logps = scored_logps(hidden, Head(weight, forbidden), targets)
    torch.testing.assert_close(logps, plain(hidden, Head(weight, forbidden), targets))
    logps.sum().backward()
    assert hidden.grad is not None and hidden.grad.isfinite().all()


# Precision.


def test_bf16_operands_keep_fp32_logits() -> None:
    """Logits of size 20, where bf16 has a step of 0.125: rounding them is wrong by 0.05 nats, the tiles by less than 1e-4."""
    hidden, weight, _, targets = operands(64, 64, 3000, torch.bfloat16)
    hidden = (hidden * 1.2).detach()  # the largest of 3000 logits is about 3.5 · 1.2 · √64
    targets[::2] = (hidden @ weight.T).argmax(1)[::2]
    exact = plain(hidden.double(), Head(weight.double(), None), targets)
    assert 20 < (hidden.double() @ weight.double().T).amax(1).median() < 60
    logps = scored_logps(hidden, Head(weight, None), targets)
    assert logps.dtype == torch.float32
    assert (logps - exact).abs().max() < 1e-4
    rounded = (hidden @ weight.T).float().log_softmax(1).gather(1, targets[:, None]).squeeze(1)
    assert (rounded - exact).abs().max() > 0.05


def test_a_confident_target() -> None:
    """z = (30, 30 − gap, …): 1 − p is about e^−gap, and p − 1 must not be rounded to bf16 before it is taken."""
    for gap in (3.0, 6.0, 9.0):
        weight = torch.eye(4, dtype=torch.bfloat16).requires_grad_()
        hidden = torch.tensor([[30.0, 30.0 - gap, 0.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
        logps = scored_logps(hidden, Head(weight, None), torch.tensor([0]))
        logps.sum().backward()
        exact = math.exp(-gap) / (1 + math.exp(-gap))
        assert logps.item() == pytest.approx(-math.log1p(math.exp(-gap)), rel=1e-3)
        assert hidden.grad is not None
        assert hidden.grad[0, 0].item() == pytest.approx(exact, rel=1e-2)


def test_a_certain_target_has_a_log_prob_of_zero() -> None:
    logps = scored_logps(torch.tensor([[1234.5, 7.0]]), Head(torch.eye(2), None), torch.tensor([0]))
    assert logps.tolist() == [0.0]


def test_gradients_of_a_bf16_head_are_summed_in_fp32(tile: Callable[[int, int], None]) -> None:
    """512 blocks of positions with one token each: summed in bf16, the last ones fall below the sum's rounding."""
    tile(1, 8)
    hidden, weight, _, _ = operands(512, 8, 16, torch.bfloat16)
    hidden = hidden.abs().detach().requires_grad_()
    targets = torch.zeros(512, dtype=torch.int64)
    scored_logps(hidden, Head(weight, None), targets).sum().backward()
    exact_weight = weight.detach().double().requires_grad_()
    exact_hidden = hidden.detach().double().requires_grad_()
    plain(exact_hidden, Head(exact_weight, None), targets).sum().backward()
    pieces = [
        torch.autograd.grad(plain(exact_hidden[i : i + 1], Head(exact_weight, None), targets[:1]).sum(), exact_weight)[
            0
        ].bfloat16()
        for i in range(512)
    ]
    narrow = pieces[0].clone()
    for piece in pieces[1:]:
        narrow += piece
    assert weight.grad is not None and hidden.grad is not None
    assert weight.grad.dtype == hidden.grad.dtype == torch.bfloat16
    torch.testing.assert_close(weight.grad.double(), exact_weight.grad, rtol=2**-8, atol=1e-4)  # rounded once
    torch.testing.assert_close(hidden.grad.double(), exact_hidden.grad, rtol=2**-8, atol=1e-4)
    assert (narrow.double() - exact_weight.grad).abs().max() > 0.02 * exact_weight.grad.abs().max()


def test_autocast_rounds_the_operands_and_nothing_else() -> None:
    hidden, weight, bias, targets = operands(16, 32, 100, torch.float32)
    exact = plain(hidden.bfloat16().double(), Head(weight.bfloat16().double(), bias.double()), targets)
    with torch.autocast("cpu", torch.bfloat16):
        logps = scored_logps(hidden.bfloat16(), Head(weight, bias), targets)
    logps.sum().backward()
    assert logps.dtype == torch.float32
    assert (logps - exact).abs().max() < 1e-4
    gradients = torch.autograd.grad(exact.sum(), (hidden, weight, bias))
    for leaf, gradient in zip((hidden, weight, bias), gradients, strict=True):
        assert leaf.grad is not None and leaf.grad.dtype == torch.float32
        torch.testing.assert_close(leaf.grad, gradient, rtol=2e-2, atol=2e-2)


def test_operands_of_two_dtypes_are_promoted() -> None:
    hidden, weight, _, targets = operands(16, 32, 100, torch.float32)
    logps = scored_logps(hidden.bfloat16(), Head(weight, None), targets)
    torch.testing.assert_close(logps, plain(hidden.bfloat16().float(), Head(weight, None), targets))


@pytest.mark.parametrize(("biased", "scale", "softcap"), HEADS)
def test_the_products_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tile: Callable[[int, int], None], biased: bool, scale: float, softcap: float | None
) -> None:
    """The branch for devices that multiply bf16 into fp32, with that product played by the CPU: slopes are rounded to bf16."""

    def mm(left: Tensor, right: Tensor, out_dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        assert left.dtype == right.dtype == torch.bfloat16
        product = left.to(out_dtype) @ right.to(out_dtype)
        return product if out is None else out.copy_(product)

    tile(8, 40)
    hidden, weight, bias, targets = operands(30, 16, 100, torch.bfloat16)
    leaves = (hidden, weight, bias) if biased else (hidden, weight)
    logps = scored_logps(hidden, Head(weight, bias if biased else None, scale, softcap), targets)
    wanted = torch.autograd.grad(logps.sum(), leaves)
    monkeypatch.setattr(head_module._Tiles, "_multiplies_narrow", True)
    monkeypatch.setattr(torch, "mm", mm)
    narrow = scored_logps(hidden, Head(weight, bias if biased else None, scale, softcap), targets)
    torch.testing.assert_close(narrow, logps, rtol=1e-5, atol=1e-5)
    for found, gradient in zip(torch.autograd.grad(narrow.sum(), leaves), wanted, strict=True):
        assert (found - gradient).norm() < 0.01 * gradient.norm()


# Autograd.


class Shapes(TorchDispatchMode):
    """Notes how many elements each tensor has that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.sizes += [
            (part.numel(), str(func)) for part in (out if isinstance(out, tuple | list) else [out]) if isinstance(part, Tensor)
        ]
        return out


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_no_tensor_is_as_large_as_positions_times_vocabulary(tile: Callable[[int, int], None], softcap: float | None) -> None:
    tile(32, 64)
    hidden, weight, bias, targets = operands(200, 8, 500, torch.float32)
    with Shapes() as shapes:
        scored_logps(hidden, Head(weight, bias, 1.0, softcap), targets).sum().backward()
    assert max(shapes.sizes)[0] == max(500 * 8, 32 * 64)  # the head itself; a tile is smaller
    with Shapes() as shapes:
        plain(hidden, Head(weight, bias, 1.0, softcap), targets)
    assert max(shapes.sizes)[0] == 200 * 500


@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_what_is_frozen_gets_no_gradient_and_costs_none(frozen: str) -> None:
    hidden, weight, bias, targets = operands(30, 8, 50, torch.float32)
    for part in (hidden,) if frozen == "hidden" else (weight, bias):
        part.requires_grad_(False)
    logps = scored_logps(hidden, Head(weight, bias), targets)
    with Shapes() as shapes:
        logps.sum().backward()
    assert (hidden.grad is None) == (frozen == "hidden")
    assert (weight.grad is None) == (bias.grad is None) == (frozen == "head")
    products = [name for _, name in shapes.sizes if "aten.addmm" in name]
    assert len(products) == 2  # the logits again, and one gradient


def test_without_gradients_nothing_is_kept() -> None:
    hidden, weight, bias, targets = operands(5, 8, 50, torch.float32)
    with torch.no_grad():
        assert not scored_logps(hidden, Head(weight, bias), targets).requires_grad


def test_a_head_that_is_also_the_embedding() -> None:
    _, weight, _, targets = operands(9, 6, 11)
    ids = targets.flip(0)

    def gradient(logps: Kernel) -> Tensor:
        return torch.autograd.grad(logps(weight[ids].tanh(), Head(weight, None), targets).sum(), weight)[0]

    torch.testing.assert_close(gradient(scored_logps), gradient(plain))


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_activation_checkpointing(reentrant: bool) -> None:
    hidden, weight, bias, targets = operands(9, 6, 11)

    def loss(hidden: Tensor) -> Tensor:
        return scored_logps(hidden * 2, Head(weight, bias), targets).sum()

    wanted = torch.autograd.grad(loss(hidden), (hidden, weight, bias))
    checkpoint(loss, hidden, use_reentrant=reentrant).backward()
    torch.testing.assert_close((hidden.grad, weight.grad, bias.grad), wanted)


# Families of models.


def family(name: str, **more: Any) -> Any:
    """A random model of 2 layers, whose logits are large enough for a cap to matter."""
    import transformers

    sizes = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "initializer_range": 0.3,
    }
    old = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4}
    config = getattr(transformers, f"{name}Config")
    names = dir(config())
    chosen = {key: value for key, value in (sizes | old).items() if key in names}
    torch.manual_seed(0)
    kind = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM", None) or getattr(transformers, f"{name}LMHeadModel")
    model = kind(config(**chosen | more)).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias)
    return model


IDS = torch.tensor([[5, 17, 33, 8, 2, 90], [1, 1, 45, 60, 3, 4]])
FAMILIES: list[tuple[str, dict[str, Any], tuple[float, float | None]]] = [
    ("Llama", {}, (1.0, None)),
    ("Llama", {"tie_word_embeddings": True}, (1.0, None)),
    ("Qwen2", {}, (1.0, None)),
    ("Qwen3", {}, (1.0, None)),
    ("Mistral", {}, (1.0, None)),
    ("Gemma2", {"final_logit_softcapping": 4.0}, (1.0, 4.0)),
    ("Gemma3Text", {}, (1.0, None)),
    ("Gemma3Text", {"final_logit_softcapping": 4.0}, (1.0, 4.0)),
    ("GPT2", {}, (1.0, None)),
    ("Cohere", {"logit_scale": 0.3}, (0.3, None)),
    ("Cohere2", {"logit_scale": 0.3}, (0.3, None)),
    ("Granite", {"logits_scaling": 4.0}, (0.25, None)),
    ("HyperCLOVAX", {"logits_scaling": 4.0}, (4.0, None)),
    ("MiniCPM3", {"dim_model_base": 8, "num_key_value_heads": 4}, (0.25, None)),
    ("FalconH1", {"lm_head_multiplier": 0.4, "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8}, (0.4, None)),
    ("RecurrentGemma", {"logits_soft_cap": 4.0, "lru_width": 32}, (1.0, 4.0)),
    ("Phi", {}, (1.0, None)),
    ("GPTJ", {}, (1.0, None)),
    ("GPTNeoX", {}, (1.0, None)),
    ("OPT", {"word_embed_proj_dim": 16, "ffn_dim": 48}, (1.0, None)),
]


@pytest.mark.parametrize(("name", "more", "changes"), FAMILIES, ids=lambda value: value if isinstance(value, str) else None)
def test_a_familys_head_gives_its_logits(name: str, more: dict[str, Any], changes: tuple[float, float | None]) -> None:
    model = family(name, **more)
    head = Head.of(model)
    assert (head.scale, head.softcap) == changes
    assert check_head(model, IDS) < 1e-5


@pytest.mark.parametrize("name", ["Phi", "GPTJ"])
def test_a_familys_bias_is_found(name: str) -> None:
    assert Head.of(family(name)).bias is not None


def test_the_check_sees_what_the_head_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    model = family("Gemma2", final_logit_softcapping=4.0)
    monkeypatch.setattr(head_module, "_logit_changes", lambda model: (1.0, None))
    assert check_head(model, IDS) > 0.1


def refusal(model: Any) -> str:
    with pytest.raises(UnknownHeadError) as error:
        Head.of(model)
    return str(error.value)


def test_unknown_changes_of_logits_are_refused() -> None:
    model = family("Llama")
    model.config.logit_scale = 0.5  # Cohere's name, but Llama does nothing with it
    assert "logit_scale=0.5" in refusal(model)
    del model.config.logit_scale
    model.config.mup_width_multiplier = 8.0
    assert refusal(model) == "LlamaForCausalLM: what mup_width_multiplier=8.0 does to its logits is not known"
    model.config.mup_width_multiplier = 1.0  # neutral, whatever it does
    assert Head.of(model).scale == 1


def test_heads_that_are_not_plain_linear_layers_are_refused() -> None:
    class Quantised(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input.round())

    model = family("Llama")
    model.lm_head = Quantised(32, 97)
    assert "no plain linear layer but Quantised" in refusal(model)
    model.lm_head = nn.Sequential(nn.Linear(32, 97))
    assert "no plain linear layer but Sequential" in refusal(model)


def test_more_between_backbone_and_head_is_refused() -> None:
    model = family("Llama")
    model.extra_norm = nn.LayerNorm(32)
    assert "extra_norm" in refusal(model)


def test_an_encoder_with_a_decoder_is_refused() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4))
    assert "encoder" in refusal(model)


def test_a_backbone_that_is_the_model_itself_is_refused() -> None:
    model = family("Llama").model
    with pytest.raises(UnknownHeadError, match="not a module of its own"):
        backbone(model)


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]])
def test_an_adapter_is_looked_through_unless_it_is_on_the_head(targets: list[str]) -> None:
    peft = pytest.importorskip("peft")
    plain_model = family("Llama")
    before = plain_model(input_ids=IDS).logits
    model = peft.get_peft_model(plain_model, peft.LoraConfig(target_modules=targets, init_lora_weights=False)).eval()
    assert (model(input_ids=IDS).logits - before).abs().max() > 0.1
    if "lm_head" in targets:
        assert "no plain linear layer" in refusal(model)
    else:
        assert backbone(model) is plain_model.model
        assert check_head(model, IDS) < 1e-5


# The ladder of kernels.


@pytest.fixture
def ladder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Kernel]]:
    """Which of some fake kernels is chosen for a head of 100 tokens, as it would be on CUDA."""

    def choose(kernels: dict[str, Kernel], dtype: torch.dtype = torch.float32, biased: bool = False) -> Kernel:
        monkeypatch.setattr(head_module, "KERNELS", kernels)
        head_module._first_right.cache_clear()
        return head_module._first_right((100, 16), biased, 1.0, None, dtype, torch.device("cpu"))

    yield choose
    head_module._first_right.cache_clear()


def right(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    bias = None if head.bias is None else head.bias.float()
    return plain(hidden.float(), Head(head.weight.float(), bias, head.scale, head.softcap), targets)


def bf16_logits(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    return (hidden @ head.weight.T).float().log_softmax(1).gather(1, targets[:, None]).squeeze(1)


def without_bias_gradient(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    assert head.bias is not None
    return right(hidden, Head(head.weight, head.bias.detach() + 0 * head.bias), targets)


def filtered(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    """Right values, and a gradient that leaves out small ones."""
    weight = head.weight.clone()
    weight.register_hook(lambda gradient: gradient * (gradient.abs() > 0.5 * gradient.abs().max()))
    return right(hidden, Head(weight, head.bias), targets)


def missing(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    raise ImportError("not installed")


def broken(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    raise RuntimeError("out of\nresources")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_right_kernel_is_chosen(
    ladder: Callable[..., Kernel], caplog: pytest.LogCaptureFixture, dtype: torch.dtype
) -> None:
    with caplog.at_level(logging.INFO):
        assert ladder({"missing": missing, "right": right, "tiles": tiled_logps}, dtype) is right
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("kernel", "dtype", "words"),
    [
        (bf16_logits, torch.bfloat16, "off by"),
        (without_bias_gradient, torch.float32, "off by"),
        (filtered, torch.float32, "off by"),
        (broken, torch.float32, "failed with RuntimeError: out of resources"),
    ],
)
def test_a_wrong_kernel_is_refused_with_one_line(
    ladder: Callable[..., Kernel], caplog: pytest.LogCaptureFixture, kernel: Kernel, dtype: torch.dtype, words: str
) -> None:
    with caplog.at_level(logging.INFO):
        assert ladder({"fake": kernel}, dtype, biased=kernel is without_bias_gradient) is tiled_logps
    assert len(caplog.records) == 1
    assert "the kernel fake is not used" in caplog.text
    assert words in caplog.text


def test_a_kernel_is_tried_once_for_a_kind_of_head(ladder: Callable[..., Kernel], caplog: pytest.LogCaptureFixture) -> None:
    ladder({"fake": broken})
    head_module._first_right((100, 16), False, 1.0, None, torch.float32, torch.device("cpu"))
    assert len(caplog.records) == 1


def test_on_a_cpu_the_tiles_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "KERNELS", {"right": right})
    assert choose_kernel(Head(torch.zeros(100, 16), None), 16, torch.device("cpu")) is tiled_logps


def test_kernels_that_are_not_installed_are_skipped_silently(
    ladder: Callable[..., Kernel], caplog: pytest.LogCaptureFixture
) -> None:
    installed = [name for name in head_module.KERNELS if _is_installed(name)]
    if installed:
        pytest.skip(f"installed: {installed}")
    assert ladder(dict(head_module.KERNELS)) is tiled_logps
    assert caplog.text == ""


def _is_installed(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None


# Normalisers.


def plain_normalisers(hidden: Tensor, head: Head) -> Tensor:
    """log Σ exp of whole logits."""
    z = head.scale * nn.functional.linear(hidden, head.weight, head.bias)
    return (z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)).logsumexp(1)


@pytest.mark.parametrize("size", TILES, ids=str)
@pytest.mark.parametrize(("biased", "scale", "softcap"), HEADS)
def test_normalisers_and_their_gradients_are_those_of_logsumexp(
    tile: Callable[[int, int], None], size: tuple[int, int], biased: bool, scale: float, softcap: float | None
) -> None:
    """Against finite differences in fp64, of both outputs at once; and against autograd on whole logits for a loss of both."""
    tile(*size)
    hidden, weight, bias, targets = operands(8, 6, 11)
    leaves = (hidden, weight, bias) if biased else (hidden, weight)

    def both(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return logps_and_normalisers(hidden, Head(weight, bias, scale, softcap), targets)

    head = Head(weight, bias if biased else None, scale, softcap)
    wanted = plain(hidden, head, targets), plain_normalisers(hidden, head)
    found = both(*leaves)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(both, leaves)
    gradients = [
        torch.autograd.grad((logps.sin() + (logps + normalisers) * normalisers).sum(), leaves, retain_graph=True)
        for logps, normalisers in (found, wanted)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


def test_normalisers_alone_have_their_gradient_too() -> None:
    """d log Σ exp z / dz = p."""
    hidden, weight, bias, targets = operands(8, 6, 11)
    normalisers = logps_and_normalisers(hidden, Head(weight, bias), targets)[1]
    (found,) = torch.autograd.grad(normalisers.sum(), bias)
    torch.testing.assert_close(found, nn.functional.linear(hidden, weight, bias).softmax(1).sum(0))


def test_a_log_prob_and_its_normaliser_are_the_targets_logit_by_hand() -> None:
    """z = (1, 2), target 0: −log(1 + e) + log(e + e²) = 1; and the gradient of that sum in z is onehot."""
    hidden = torch.tensor([[1.0, 2.0]], requires_grad=True)
    logps, normalisers = logps_and_normalisers(hidden, Head(torch.eye(2), None), torch.tensor([0]))
    (logps + normalisers).sum().backward()
    assert (logps + normalisers).item() == pytest.approx(1.0)
    assert normalisers.item() == pytest.approx(math.log(math.e + math.e**2))
    torch.testing.assert_close(hidden.grad, torch.tensor([[1.0, 0.0]]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_normalisers_need_no_larger_tensor_either(tile: Callable[[int, int], None], softcap: float | None) -> None:
    tile(32, 64)
    hidden, weight, bias, targets = operands(200, 8, 500, torch.float32)
    with Shapes() as shapes:
        logps, normalisers = logps_and_normalisers(hidden, Head(weight, bias, 1.0, softcap), targets)
        (logps * normalisers).sum().backward()
    assert max(shapes.sizes)[0] == max(500 * 8, 32 * 64)


@pytest.mark.parametrize(("biased", "scale", "softcap"), HEADS)
def test_a_tempered_head_divides_the_logits(biased: bool, scale: float, softcap: float | None) -> None:
    """log softmax(z / 0.7), with z what the model's head gives, cap included."""
    hidden, weight, bias, targets = operands(8, 6, 11)
    head = Head(weight, bias if biased else None, scale, softcap)
    z = scale * nn.functional.linear(hidden, weight, bias if biased else None)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    logps, normalisers = logps_and_normalisers(hidden, head.tempered(0.7), targets)
    torch.testing.assert_close(logps, (z / 0.7).log_softmax(1).gather(1, targets[:, None]).squeeze(1))
    torch.testing.assert_close(normalisers, (z / 0.7).logsumexp(1))
    assert head.tempered(1.0) is head
