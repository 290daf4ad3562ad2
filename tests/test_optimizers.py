"""Optimisers against formulas worked out here, and what fp32 master weights keep that bf16 would lose."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gsil_bench.errors import UserError
from gsil_bench.training.optimizers import AnyOptimizer, MasterWeights, build_optimizer, trained_parameters

BETAS = (0.8, 0.95)
RATES = (0.1, 0.05)  # changed between the steps, as the loop does
DECAY = 0.3


def gradients_of_steps(size: int, steps: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(size, generator=generator, dtype=dtype) for _ in range(steps)]


def small_model(dtype: torch.dtype) -> nn.Module:
    """Its matrices have 4200 elements: enough for 8-bit moments."""
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 700), nn.Tanh(), nn.Linear(700, 6)).to(dtype)


def train(model: nn.Module, optimizer: AnyOptimizer, first: int, steps: int, rate: float = 1e-3) -> None:
    """Steps of two micro-batches, clipped; every step has its own data."""
    for step in range(first, first + steps):
        torch.manual_seed(step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        for _ in range(2):
            model(torch.randn(4, 6, dtype=next(model.parameters()).dtype)).float().square().sum().backward()
        nn.utils.clip_grad_norm_(trained_parameters(optimizer), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("name", ["adamw", "rmsprop"])
def test_two_steps_by_hand(name: str) -> None:
    start = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    parameter = nn.Parameter(start.clone())
    optimizer = build_optimizer([parameter], name, RATES[0], BETAS, DECAY)
    weight, mean, square = start.clone(), torch.zeros(4).double(), torch.zeros(4).double()
    for step, (rate, gradient) in enumerate(zip(RATES, gradients_of_steps(4, 2), strict=True), 1):
        optimizer.param_groups[0]["lr"] = rate
        parameter.grad = gradient.clone()
        optimizer.step()
        if name == "adamw":
            mean = 0.8 * mean + 0.2 * gradient
            square = 0.95 * square + 0.05 * gradient**2
            unbiased = (square / (1 - 0.95**step)).sqrt()
            weight = weight - rate * DECAY * weight - rate * (mean / (1 - 0.8**step)) / (unbiased + 1e-8)
        else:
            gradient = gradient + DECAY * weight
            square = 0.99 * square + 0.01 * gradient**2
            weight = weight - rate * gradient / (square.sqrt() + 1e-8)
        torch.testing.assert_close(parameter.detach(), weight, rtol=1e-12, atol=1e-12)


def test_a_model_in_fp32_is_trained_by_the_bare_optimiser() -> None:
    """As before there was a choice: not a bit of it may change."""
    model, reference = small_model(torch.float32), small_model(torch.float32)
    optimizer = build_optimizer(model.parameters(), "adamw", 1e-3, (0.9, 0.999), 0.01)
    assert type(optimizer) is torch.optim.AdamW
    assert all(one is other for one, other in zip(trained_parameters(optimizer), model.parameters(), strict=True))
    train(model, optimizer, 0, 5)
    train(reference, torch.optim.AdamW(reference.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01), 0, 5)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), reference.parameters(), strict=True))


def test_frozen_parameters_are_left_out() -> None:
    model = small_model(torch.bfloat16)
    model[0].requires_grad_(False)
    before = [parameter.clone() for parameter in model[0].parameters()]
    optimizer = build_optimizer(model.parameters(), "adamw", 1e-2, BETAS, DECAY)
    assert [parameter.shape for parameter in trained_parameters(optimizer)] == [p.shape for p in model[2].parameters()]
    train(model, optimizer, 0, 2)
    assert all(torch.equal(one, other) for one, other in zip(before, model[0].parameters(), strict=True))
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        build_optimizer(model.parameters(), "adamw", 1e-2, BETAS, DECAY)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["adamw", "rmsprop"])
def test_a_thousand_updates_that_the_weights_would_lose(name: str, dtype: torch.dtype) -> None:
    start = torch.full((16,), 1.0)
    wide, low, bare = nn.Parameter(start.clone()), nn.Parameter(start.to(dtype)), nn.Parameter(start.to(dtype))
    reference = build_optimizer([wide], name, 2e-5, (0.9, 0.999), 0.0)
    optimizer = build_optimizer([low], name, 2e-5, (0.9, 0.999), 0.0)
    direct = torch.optim.AdamW([bare], lr=2e-5, weight_decay=0.0)
    for _ in range(1000):
        for parameter in (wide, low, bare):
            (parameter.float() * 0.5).sum().backward()
        for each in (reference, optimizer, direct):
            each.step()
            each.zero_grad(set_to_none=True)
    assert torch.equal(trained_parameters(optimizer)[0], wide)
    assert torch.equal(low, wide.to(dtype)) and (low < 0.99).all()
    assert torch.equal(bare, start.to(dtype))  # not one of the updates arrived


def test_gradients_of_micro_batches_are_summed_in_fp32() -> None:
    """Sixty-four gradients that lie far apart: their sum in bf16 is off by tenths of a percent."""
    parts = [gradient.bfloat16() * 2.0 ** -(number % 8) for number, gradient in enumerate(gradients_of_steps(32, 64))]
    low, bare = nn.Parameter(torch.zeros(32).bfloat16()), nn.Parameter(torch.zeros(32).bfloat16())
    optimizer = build_optimizer([low], "adamw", 1e-3, BETAS, 0.0)
    for part in parts:
        for parameter in (low, bare):
            (parameter * part).sum().backward()
        assert low.grad is None  # moved and freed
    exact = torch.stack([part.float() for part in parts])
    total = torch.zeros(32)
    for part in exact:
        total = total + part
    gradient = trained_parameters(optimizer)[0].grad
    assert gradient is not None and bare.grad is not None
    assert gradient.dtype == torch.float32 and torch.equal(gradient, total)
    assert (bare.grad.float() - total).norm() > 0.003 * total.norm()


def test_clipping_acts_on_what_is_applied() -> None:
    model = small_model(torch.bfloat16)
    optimizer = build_optimizer(model.parameters(), "adamw", 1e-3, BETAS, 0.0)
    model(torch.ones(4, 6).bfloat16()).float().square().sum().mul(100).backward()
    before = nn.utils.clip_grad_norm_(trained_parameters(optimizer), 0.5)
    after = nn.utils.get_total_norm([p.grad for p in trained_parameters(optimizer) if p.grad is not None])
    assert before > 1 and after == pytest.approx(0.5, rel=1e-5)
    optimizer.zero_grad(set_to_none=True)
    assert all(parameter.grad is None for parameter in [*trained_parameters(optimizer), *model.parameters()])


def test_a_model_of_mixed_precision_has_masters_only_where_needed() -> None:
    model = small_model(torch.bfloat16)
    model[2].float()
    optimizer = build_optimizer(model.parameters(), "adamw", 1e-3, BETAS, 0.0)
    weights = list(model.parameters())
    masters = trained_parameters(optimizer)
    assert {master.dtype for master in masters} == {torch.float32}
    assert [master is weight for master, weight in zip(masters, weights, strict=True)] == [False, False, True, True]
    (weights[0].float().sum() + weights[2].sum()).backward()
    optimizer.step()
    assert torch.equal(weights[0], masters[0].bfloat16())
    assert masters[0].grad is not None and weights[0].grad is None and weights[2].grad is not None


def bits(model: nn.Module, optimizer: AnyOptimizer) -> list[torch.Tensor]:
    return [tensor.detach().clone() for tensor in [*model.parameters(), *trained_parameters(optimizer)]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name",
    [
        "adamw",
        "rmsprop",
        pytest.param(
            "adamw-8bit", marks=pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="pip install bitsandbytes")
        ),
    ],
)
def test_a_resumed_run_repeats_every_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = small_model(dtype)
    optimizer = build_optimizer(model.parameters(), name, 1e-3, BETAS, DECAY)
    train(model, optimizer, 0, 7)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    train(model, optimizer, 7, 6)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again = small_model(dtype)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    resumed = build_optimizer(again.parameters(), name, 1e-3, BETAS, DECAY)
    again.load_state_dict(state["model"])
    resumed.load_state_dict(state["optimizer"])
    train(again, resumed, 7, 6)
    assert all(torch.equal(one, other) for one, other in zip(bits(model, optimizer), bits(again, resumed), strict=True))


def test_masters_alone_restore_the_weights_and_do_not_fit_another_model() -> None:
    model = small_model(torch.bfloat16)
    optimizer = build_optimizer(model.parameters(), "adamw", 1e-2, BETAS, DECAY)
    train(model, optimizer, 0, 3)
    again = small_model(torch.bfloat16)
    resumed = build_optimizer(again.parameters(), "adamw", 1e-2, BETAS, DECAY)
    resumed.load_state_dict(optimizer.state_dict())
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))
    other = build_optimizer([nn.Parameter(torch.zeros(2).bfloat16())], "adamw", 1e-2, BETAS, DECAY)
    with pytest.raises(ValueError, match="other shapes"):
        other.load_state_dict(optimizer.state_dict())


def test_a_second_optimiser_of_a_model_gets_the_gradients() -> None:
    parameter = nn.Parameter(torch.ones(4).bfloat16())
    first = build_optimizer([parameter], "adamw", 1e-3, BETAS, 0.0)
    assert isinstance(first, MasterWeights)
    del first
    second = build_optimizer([parameter], "rmsprop", 1e-3, BETAS, 0.0)
    parameter.sum().backward()
    assert torch.equal(trained_parameters(second)[0].grad, torch.ones(4))  # type: ignore[arg-type]


def test_replicas_in_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """DDP would average gradients that have moved: each rank would go its own way."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    build_optimizer(small_model(torch.float32).parameters(), "adamw", 1e-3, BETAS, 0.0)
    with pytest.raises(UserError, match="several processes"):
        build_optimizer(small_model(torch.bfloat16).parameters(), "adamw", 1e-3, BETAS, 0.0)


def test_names_that_there_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    parameter = nn.Parameter(torch.ones(4))
    with pytest.raises(UserError, match="unknown optimizer 'adam': did you mean 'adamw'") as caught:
        build_optimizer([parameter], "adam", 1e-3, BETAS, 0.0)
    assert "rmsprop" in str(caught.value)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="'adamw-8bit' needs bitsandbytes: pip install bitsandbytes") as caught:
        build_optimizer([parameter], "adamw-8bit", 1e-3, BETAS, 0.0)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="pip install bitsandbytes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_8_bit_moments_follow_32_bit_ones(dtype: torch.dtype) -> None:
    """Weights of at least 4096 elements have 8-bit moments."""
    start = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    weights = {name: nn.Parameter(start.clone()) for name in ("adamw", "adamw-8bit")}
    optimizers = {name: build_optimizer([weights[name]], name, 1e-3, (0.9, 0.999), 0.01) for name in weights}
    for gradient in gradients_of_steps(64 * 128, 20, torch.float32):
        for name, optimizer in optimizers.items():
            (weights[name].float() * gradient.view(64, 128)).sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    moved = {name: trained_parameters(optimizers[name])[0].detach() - start.float() for name in weights}
    inner: Any = getattr(optimizers["adamw-8bit"], "_inner", optimizers["adamw-8bit"])
    assert {state["state1"].dtype for state in inner.state.values()} == {torch.uint8}
    assert (moved["adamw-8bit"] - moved["adamw"]).norm() < 0.1 * moved["adamw"].norm()
